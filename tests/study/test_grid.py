"""Studies: which runs a file stands for, and that many at once are the same as one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, FedNormError, UnknownNameError
from fednorm.federated.simulate import simulate
from fednorm.study import grid
from fednorm.study.grid import expand, read_study, run_study

Results = dict[str, tuple[dict[str, Any] | None, str]]


def short(configs: list[RunConfig]) -> list[tuple[str, str, int, float]]:
    return [(c.strategy.name, c.norm.name, c.seed, c.train.learning_rate) for c in configs]


@pytest.fixture
def study(tmp_path: Path) -> Callable[[str], list[RunConfig]]:
    def read(text: str) -> list[RunConfig]:
        path = tmp_path / "study.toml"
        path.write_text(text)
        return read_study(path)

    return read


def test_every_point_meets_every_combination(study: Callable[[str], list[RunConfig]]) -> None:
    configs = study("""
        [base]
        kind = "federated"
        seed = 9
        model = { width = 4 }
        [[points]]
        strategy.name = "fedbn"
        [[points]]
        strategy.name = "fedavg"
        norm = { name = "group-norm", num_groups = 4 }
        [grid]
        seed = [1, 2]
        train.learning_rate = [0.1, 0.2]
    """)
    expected = [
        (*method, seed, rate)
        for method in (("fedbn", "batch_norm"), ("fedavg", "group_norm"))
        for seed in (1, 2)
        for rate in (0.1, 0.2)
    ]
    assert short(configs) == expected
    assert {c.model.width for c in configs} == {4}
    assert dict(configs[-1].norm.options) == {"num_groups": 4}


def test_tables_inline_tables_and_dotted_keys_are_one(study: Callable[[str], list[RunConfig]]) -> None:
    spellings = (
        '[base]\n[grid]\nstrategy.name = ["fedavg", "fedbn"]\ndata.clients_per_domain = [1, 2]',
        '[base]\n[grid.strategy]\nname = ["fedavg", "fedbn"]\n[grid.data]\nclients_per_domain = [1, 2]',
        '[base]\n[grid]\nstrategy = {name = ["fedavg", "fedbn"]}\ndata = {clients_per_domain = [1, 2]}',
    )
    assert len({tuple(config.hash for config in study(text)) for text in spellings}) == 1
    assert len(study(spellings[0])) == 4


def test_a_run_that_is_named_twice_is_run_once() -> None:
    points = [{"strategy": {"name": "fedbn"}}, {"strategy": {"name": "FedBN"}}, {"rounds": {"num_rounds": 10}}, {}]
    configs = expand({}, points, {"seed": [1, 2, 1], "data": {"dir": ["/a", "/b"]}}, {})
    assert short(configs) == [(name, "batch_norm", seed, 0.01) for name in ("fedbn", "fedavg") for seed in (1, 2)]


def test_overrides_lie_over_points_and_grid() -> None:
    configs = expand({"seed": 1}, [{"seed": 2}], {"seed": [3]}, {"data": {"dir": "/data"}})
    assert [(config.seed, config.data.dir) for config in configs] == [(3, "/data")]
    assert expand({"seed": 1}, [{"seed": 2}], {"seed": [3]}, {"seed": 4})[0].seed == 4


def test_values_that_are_lists_themselves_are_lists_of_lists() -> None:
    configs = expand({}, [{}], {"data": {"domains": [["scans"], ["photo", "fonts"]]}}, {})
    assert [config.data.domains for config in configs] == [("scans",), ("photo", "fonts")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must have a \[base\] table.*got an empty file"),
        ("[bose]", r"must have a \[base\] table.*got bose"),
        ("[base]\n[extra]", r"must have a \[base\] table.*got base, extra"),
        ("base = 3", r"\[base\] and \[grid\] are tables.*got base = 3"),
        ("grid = 3\n[base]", r"\[base\] and \[grid\] are tables.*grid = 3"),
        ("points = 3\n[base]", r"\[\[points\]\] are tables.*got 3"),
        ("points = []\n[base]", r"\[\[points\]\] are tables.*got \[\]"),
        ("points = [1]\n[base]", r"\[\[points\]\] are tables.*got \[1\]"),
        ("[base]\n[grid]\nseed = 3", r"grid\.seed must be a list of one value or more; got 3"),
        ("[base]\n[grid]\ntrain.agc = []", r"grid\.train\.agc must be a list of one value or more; got \[\]"),
        ("[base]\nseed = [1, 2]", r"seed must be an integer; got \[1, 2\]"),
        ("[base]\n[grid]\ntrain.learnin_rate = [1.0]", r"no configuration key 'train\.learnin_rate'.*learning_rate"),
        ("[base]\n[grid]\nseed = [[1]]", r"seed must be an integer; got \[1\]"),
        ('[base]\nkind = "centralised"', "kind must be one of federated, continual; got 'centralised'"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text: str, message: str, study: Callable[[str], list[RunConfig]]) -> None:
    with pytest.raises(ConfigError, match=message):
        study(text)


def test_an_unknown_name_in_a_grid_is_refused_before_anything_runs(study: Callable[[str], list[RunConfig]]) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'fedbn'"):
        study('[base]\n[grid]\nstrategy.name = ["fedavg", "fedbm"]')


@pytest.mark.parametrize(
    "recipe", sorted((Path(grid.__file__).parent / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_studies_that_ship_can_be_read(recipe: Path) -> None:
    configs = read_study(recipe)
    assert configs
    assert len({config.hash for config in configs}) == len(configs)


def _run_all(configs: list[RunConfig], runs: Path, jobs: int) -> Results:
    results: Results = {}

    def on_done(config: RunConfig, result: dict[str, Any] | None, reason: str) -> None:
        results[config.hash] = (result, reason)

    run_study(configs, runs=runs, jobs=jobs, on_done=on_done)
    return results


def test_two_at_a_time_are_one_after_the_other_and_a_failure_stops_nobody(
    small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    base = small(rounds={"num_rounds": 2})
    good = expand(base, [{}], {"strategy": {"name": ["fedbn", "fedadam"]}}, {})
    bad = expand(base, [{"strategy": {"name": "fedavg"}, "train": {"learning_rate": 1e30}}], {}, {})
    unfit = expand(base, [{"norm": {"name": "none"}}], {}, {})
    configs = [*bad, *unfit, *good]
    results = _run_all(configs, tmp_path / "two", 2)
    assert results.keys() == {config.hash for config in configs}
    assert results[bad[0].hash][0] is results[unfit[0].hash][0] is None
    assert "Round 2: none of the 5 sampled clients" in results[bad[0].hash][1]
    assert "would silently be FedAvg" in results[unfit[0].hash][1]
    for config in good:
        result, reason = results[config.hash]
        assert result is not None
        assert reason == ""
        alone = simulate(config, runs=tmp_path / "one")
        assert [line["train_loss"] for line in result["rounds"]] == [line["train_loss"] for line in alone["rounds"]]
        models = [load_file(Path(r["run"]) / "model.safetensors") for r in (result, alone)]
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


class _Pool:
    """Stands for a pool of processes of which one was killed."""

    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, _run: Any, config: RunConfig, _runs: Path) -> Any:
        from concurrent.futures import Future
        from concurrent.futures.process import BrokenProcessPool

        future: Any = Future()
        if config.seed == 1:
            future.set_exception(BrokenProcessPool("a process was killed"))
        else:
            future.set_result(({"seed": config.seed}, ""))
        return future


def test_a_process_that_is_killed_is_a_failed_run_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "ProcessPoolExecutor", _Pool)
    configs = expand({}, [{}], {"seed": [1, 2]}, {})
    results = _run_all(configs, tmp_path, 1)
    assert results[configs[0].hash] == (None, "BrokenProcessPool: a process was killed")
    assert results[configs[1].hash] == ({"seed": 2}, "")


def test_a_failure_of_the_user_s_making_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FedNormError("because")

    monkeypatch.setattr("fednorm.federated.simulate.simulate", fail)
    assert grid._run(expand({}, [{}], {}, {})[0], tmp_path) == (None, "because")
