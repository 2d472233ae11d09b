"""A run that is killed anywhere goes on from its last checkpoint and ends with the very same numbers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednorm.config import resolve
from fednorm.errors import RecordError
from fednorm.federation import server
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench

METHODS: dict[str, dict[str, Any]] = {
    "client's local tensors": {"evaluate": {"kinds": ["own", "cross", "pooled"]}},
    "optimizer of the server": {"strategy": {"name": "fedadam"}},
    "momentum of the server": {"strategy": {"name": "fedavgm"}},
    "clients that are not sampled": {"rounds": {"fraction": 0.4}},
    "checkpoint each third round": {"rounds": {"checkpoint_every": 3}, "strategy": {"name": "silobn"}},
    "evaluation each second round": {"rounds": {"evaluate_every": 2}},
    "cohorts of clients": {"engine": "cohort", "cohort_size": 2},
}

PLACES = (
    "in a client's training",
    "in the line",
    "in the checkpoint",
    "in the result",
    *(
        pytest.param(place, marks=pytest.mark.slow)
        for place in ("before the line", "before the checkpoint", "after the round", "before the result")
    ),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, written: Any) -> Callable[[dict[str, Any]], Any]:
    """Return what the uninterrupted run of some values leaves, run once."""
    made: dict[str, Any] = {}

    def reference(values: dict[str, Any]) -> Any:
        config = resolve(values)
        key = f"{config.hash} {config.rounds.checkpoint_every}"
        if key not in made:
            made[key] = written(Path(simulate(config, runs=tmp_path_factory.mktemp("whole"))["run"]))
        return made[key]

    return reference


class Watch:
    """Remembers which rounds were run, and what clients and server held before the first of them."""

    def __init__(self) -> None:
        self.first = 0
        self.rounds: list[int] = []

    def begin(self, bench: Workbench, first_round: int) -> None:
        assert bench.config.rounds.num_rounds == 4
        self.first = first_round

    def round(self, line: Any) -> None:
        self.rounds.append(line["round"])


def go_on(values: dict[str, Any], runs: Path) -> tuple[Path, Watch]:
    watch = Watch()
    return Path(simulate(resolve(values), runs=runs, observer=watch)["run"]), watch


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_anywhere_goes_on(
    place: str, small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small(**METHODS["client's local tensors"])
    _, how = launcher.run(values, tmp_path, place, 3)
    assert how == -signal.SIGKILL
    folder, watch = go_on(values, tmp_path)
    assert watch.first == {"after the round": 4, "before the result": 5, "in the result": 5}.get(place, 3)
    assert watch.rounds == list(range(watch.first, 5))
    assert written(folder) == whole(values)
    assert not list(folder.glob("*.part"))


@pytest.mark.few(1)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "client's local tensors"])
@pytest.mark.parametrize("place", ["in a client's training", "after the round"])
def test_every_kind_of_state_is_restored(
    method: str, place: str, small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small(**METHODS[method])
    reference = whole(values)
    if method == "clients that are not sampled":
        place, rests = "after the round", [set(range(5)) - set(line["sampled"]) for line in reference.rounds]
        assert rests[2] - rests[3]  # a client sits out round 3, trains in round 4, and needs its tensors of before
    _, how = launcher.run(values, tmp_path, place, 3)
    assert how == -signal.SIGKILL
    folder, watch = go_on(values, tmp_path)
    if method == "checkpoint each third round":
        assert watch.first == (4 if place == "after the round" else 1)
    assert written(folder) == reference


@pytest.mark.slow
def test_a_run_may_be_killed_again_and_again(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small(**METHODS["clients that are not sampled"])
    for server_round in (1, 2, 3):
        launcher.run(values, tmp_path, "before the checkpoint", server_round)
        launcher.run(values, tmp_path, "after the round", server_round)
    folder, watch = go_on(values, tmp_path)
    assert watch.rounds == [4]
    assert written(folder) == whole(values)


@pytest.mark.few(1)
@pytest.mark.parametrize("lost", ["client", "strategy"])
def test_the_comparison_would_notice_lost_state(
    lost: str, small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small(**METHODS["client's local tensors" if lost == "client" else "optimizer of the server"])
    launcher.run(values, tmp_path, "after the round", 3)
    restore = server.restored

    def forgetful(checkpoint: Any, bench: Any, grid: Any) -> Any:
        forgotten = [tensor for key, tensor in checkpoint.tensors.items() if key.startswith(lost)]
        for tensor in forgotten:
            tensor.zero_()
        assert forgotten
        return restore(checkpoint, bench, grid)

    monkeypatch.setattr(server, "restored", forgetful)
    folder, _ = go_on(values, tmp_path)
    with pytest.raises(AssertionError):
        assert written(folder) == whole(values)


def test_a_checkpoint_holds_every_client_s_local_tensors(small: Any, launcher: Any, tmp_path: Path) -> None:
    launcher.run(small(), tmp_path, "after the round", 2)
    folder = next(tmp_path.iterdir())
    tensors = load_file(folder / "checkpoint.safetensors")
    plan = Workbench(resolve(small())).plan
    expected = {f"server/{key}" for key in plan.sent} | {f"client/{i}/{key}" for i in range(5) for key in plan.local}
    assert set(tensors) == expected
    assert not torch.equal(tensors["client/0/norm1.running_mean"], tensors["client/1/norm1.running_mean"])


def test_a_finished_run_is_read_back_and_not_run_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = simulate(resolve(small()), runs=tmp_path)
    monkeypatch.setattr(server, "_serve", lambda *_: pytest.fail("the run was run again"))
    before = {path: path.stat().st_mtime_ns for path in Path(first["run"]).iterdir()}
    assert simulate(resolve(small()), runs=tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first["run"]).iterdir() if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_a_record_that_was_moved_says_where_it_is(small: Any, tmp_path: Path) -> None:
    first = simulate(resolve(small()), runs=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    again = simulate(resolve(small()), runs=tmp_path / "there")
    assert again == {**first, "run": str(tmp_path / "there" / Path(first["run"]).name)}


def test_two_processes_never_write_to_one_record(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    pid, how = launcher.run(values, tmp_path, "stop", 2)
    try:
        assert how == "stopped"
        with pytest.raises(RecordError, match="Another process is running this run now"):
            go_on(values, tmp_path)
        folder = next(tmp_path.iterdir())
        assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while not (folder / "result.json").exists() or (folder / "checkpoint.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert written(folder) == whole(values)


def test_a_full_disk_ends_the_run_and_loses_nothing(
    small: Any, launcher: Any, whole: Any, written: Any, tmp_path: Path
) -> None:
    values = small()
    _, how = launcher.run(values, tmp_path, "disk full", 2)  # no file of more than 20 kB from then on
    assert how == 3
    message = (tmp_path / "error.txt").read_text()
    assert message.startswith("RecordError: Cannot write checkpoint.safetensors in ")
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert not list(folder.glob("*.part"))
    folder, watch = go_on(values, tmp_path)
    assert watch.rounds == [3, 4]
    assert written(folder) == whole(values)


class Stop:
    """Stops a run after its first round."""

    def begin(self, *_: Any) -> None:
        pass

    def round(self, _: Any) -> None:
        raise KeyboardInterrupt


def test_other_data_than_the_checkpoints_are_refused_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(
        {"data": {"train_per_client": 16, "test_per_domain": 10}, "model": {"width": 4}, "rounds": {"num_rounds": 2}}
    )
    with pytest.raises(KeyboardInterrupt):
        simulate(config, runs=tmp_path, observer=Stop())
    folder = next(tmp_path.iterdir())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("fednorm.data.domain.Federation.digest", lambda _: "0123456789abcdef")
        with pytest.raises(RecordError, match=r"trained on other data: .* 0123456789abcdef.*--data-dir"):
            simulate(config, runs=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [line["round"] for line in simulate(config, runs=tmp_path)["rounds"]] == [1, 2]
