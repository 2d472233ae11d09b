"""One configuration on our in-process grid and on Flower's own runtime: the same numbers, to the last bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

import fednorm.cli.app as cli
from fednorm.config import resolve
from fednorm.errors import RecordError
from fednorm.federation import simulate_flower
from fednorm.federation.flower_runtime import run_with_flower, write_app
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import workbench_of
from fednorm.records.checkpoint import Checkpoint
from fednorm.records.record import RunRecord

VALUES: dict[str, Any] = {
    "data": {"train_per_client": 20, "test_per_domain": 10, "clients_per_domain": 2},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "rounds": {"num_rounds": 2, "fraction": 0.5},
    "evaluate": {"kinds": ["own", "cross", "pooled", "reestimated"]},
}


class Both(NamedTuple):
    ours: dict[str, Any]
    flowers: dict[str, Any]
    told: list[int]


class Watch:
    def __init__(self) -> None:
        self.rounds: list[int] = []

    def begin(self, bench: Any, first_round: int) -> None:
        assert (bench.config.strategy.name, first_round) == ("fedbn", 1)

    def round(self, line: Any) -> None:
        self.rounds.append(line["round"])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    pytest.importorskip("ray", reason="Flower's simulation runtime needs ray")
    config, folder, watch = resolve(VALUES), tmp_path_factory.mktemp("runtimes"), Watch()
    flowers = simulate_flower.simulate_flower(config, runs=folder / "flower", observer=watch, timeout=300)
    return Both(simulate(config, runs=folder / "ours"), flowers, watch.rounds)


def lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["run"]) / "rounds.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "digest")} for line in text.splitlines()]


STRATEGIES = ("scaffold", "ditto", "fedbabu", "local", "centralized")


@pytest.mark.flower
@pytest.mark.slow
def test_what_clients_keep_and_send_besides_is_the_same_on_both_runtimes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start of Flower's runtime has all of these runs, one after the other."""
    pytest.importorskip("ray", reason="Flower's simulation runtime needs ray")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "support"))
    configs = {
        name: resolve({**VALUES, "strategy": {"name": name}, "evaluate": {"kinds": ["own"]}}) for name in STRATEGIES
    }
    run_config = {
        "configs": json.dumps({name: config.to_dict() for name, config in configs.items()}),
        "runs": str(tmp_path / "flower"),
    }
    app = write_app(tmp_path / "app", "several_runs:server", "several_runs:client", run_config)
    clients = len(workbench_of(configs["scaffold"]).federation.clients)
    run_with_flower(app, num_supernodes=clients, run_config={}, home=tmp_path / "home", timeout=300)
    for config in configs.values():
        flowers, ours = RunRecord(tmp_path / "flower", config).result(), simulate(config, runs=tmp_path / "ours")
        assert flowers is not None
        models = [load_file(Path(result["run"]) / "model.safetensors") for result in (ours, flowers)]
        assert models[0].keys() == models[1].keys()
        assert all(tensor.numpy().tobytes() == models[1][key].numpy().tobytes() for key, tensor in models[0].items())
        assert lines(ours) == lines(flowers)
        assert flowers["rejected_updates"] == 0


@pytest.mark.flower
@pytest.mark.slow
def test_two_rounds_are_the_same_to_the_last_bit_on_both_runtimes(both: Both) -> None:
    """Tensors, every client's metrics, who was sampled, bytes, and the matrix under other clients' tensors."""
    models = [load_file(Path(result["run"]) / "model.safetensors") for result in (both.ours, both.flowers)]
    assert models[0].keys() == models[1].keys()
    for key, tensor in models[0].items():
        assert tensor.dtype == models[1][key].dtype
        assert tensor.numpy().tobytes() == models[1][key].numpy().tobytes(), key
    assert lines(both.ours) == lines(both.flowers)
    assert [len(line["sampled"]) for line in both.ours["rounds"]] == [5, 5]
    assert both.ours["rounds"][0]["sampled"] != both.ours["rounds"][1]["sampled"]
    for line in both.flowers["rounds"]:
        assert line["bytes_down"] + line["bytes_up"] == both.flowers["plan"]["bytes_per_round"]
        assert line["rejected"] == []
    timeless = [
        {k: v for k, v in r.items() if k not in ("seconds", "run", "rounds")} for r in (both.ours, both.flowers)
    ]
    assert timeless[0] == timeless[1]
    assert len(both.flowers["evaluation"]["cross"]["under"]) == len(
        {p for x in both.ours["rounds"] for p in x["sampled"]}
    )
    assert both.told == [1, 2]
    assert not (Path(both.flowers["run"]) / "flower").exists()


# Without a start of Flower --------------------------------------------------------------------------------------------


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_flower, "run_with_flower", lambda *_, **__: pytest.fail("Flower was started"))


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--strategy", "fedbn", "--norm", "none"), "silently be FedAvg"),
        (("--evaluate", "unseen"), "data.held_out"),
        (("--train-per-client", "1"), "one training image"),
    ],
)
def test_a_wrong_configuration_fails_before_flower_starts(
    arguments: tuple[str, ...],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["fednorm", "federated", "--runtime", "flower", "--runs", str(tmp_path), "--set", "model.width=4"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert word in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.usefixtures("no_start")
def test_a_finished_run_is_read_back_on_any_runtime(tmp_path: Path) -> None:
    config = resolve(VALUES)
    assert simulate(config, runs=tmp_path) == simulate_flower.simulate_flower(config, runs=tmp_path)


@pytest.mark.usefixtures("no_start")
def test_flower_never_touches_the_record_of_a_run_that_goes_on_elsewhere(tmp_path: Path) -> None:
    config = resolve(VALUES)
    record = RunRecord(tmp_path, config)
    record.prepare()
    record.append_line({"round": 1})
    with record.locked(), pytest.raises(RecordError, match="Another process"):
        simulate_flower.simulate_flower(config, runs=tmp_path)
    record.save_checkpoint(Checkpoint(1, {}))
    with pytest.raises(RecordError, match=r"cannot go on from its checkpoint.*--runtime in-process"):
        simulate_flower.simulate_flower(config, runs=tmp_path)
    assert record.lines() == [{"round": 1}]
    assert record.load_checkpoint() is not None


def test_lines_of_an_attempt_that_was_cut_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(VALUES)
    record = RunRecord(tmp_path, config)
    record.prepare()
    record.append_line({"round": 1, "old": True})
    seen: list[Any] = []

    def start(*_: Any, **__: Any) -> None:
        seen.extend(record.lines())
        record.append_line({"round": 1})

    monkeypatch.setattr(simulate_flower, "run_with_flower", start)
    with pytest.raises(RecordError, match="left no result"):
        simulate_flower.simulate_flower(config, runs=tmp_path)
    assert seen == []
    assert record.lines() == [{"round": 1}]
