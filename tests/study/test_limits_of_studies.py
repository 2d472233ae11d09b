"""A study that is too large, or of which no run can be made, is refused by a sentence and leaves nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fednorm.errors import ConfigError, FedNormError
from fednorm.study import worker
from fednorm.study.grid import MOST_RUNS, axes
from fednorm.study.runner import execute
from fednorm.study.study import make_study

TEN = list(range(10))


def grid(dimensions: int, **tables: Any) -> dict[str, Any]:
    keys = ["train.learning_rate", "train.momentum", "seed", "train.weight_decay", "train.batch_size"]
    keys += ["rounds.num_rounds", "data.train_per_client", "data.test_per_domain", "evaluate.images", "model.width"]
    nested: dict[str, Any] = {}
    for key in keys[:dimensions]:
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = [value / 100 + 0.01 for value in TEN] if key.startswith("train.") else [v + 2 for v in TEN]
    return {"base": {"kind": "federated"}, "grid": nested, **tables}


@pytest.mark.parametrize(
    ("document", "count"),
    [
        (grid(8), "100000000 runs"),
        (grid(5, points=[{}, {"strategy": {"name": "fedbn"}}]), "200000 runs"),
        ({"base": {}, "search": grid(8)["grid"]}, "100000000 runs"),
        ({"base": {}, "search": grid(2)["grid"], "select": {"seed": list(range(101))}}, "10100 runs"),
        ({"base": {}, "points": [{"search": [grid(3)["grid"]] * 11}]}, "11000 runs"),
    ],
)
def test_runs_are_counted_before_one_is_made(document: dict[str, Any], count: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"asks for {count} .* at most 10,000"):
        make_study(document)
    assert time.monotonic() - began < 1


def test_a_list_is_checked_in_a_moment_however_long() -> None:
    began = time.monotonic()
    assert len(axes({"seed": list(range(MOST_RUNS))})[0].values) == MOST_RUNS
    with pytest.raises(ConfigError, match="10,001 values"):
        axes({"seed": list(range(MOST_RUNS + 1))})
    with pytest.raises(ConfigError, match=r"names 0 twice"):
        axes({"seed": [*range(MOST_RUNS - 1), 0]})
    assert [axis.values for axis in axes({"a": [True, 1, 0.5], "b": [["x"], ["y"]]})] == [
        (True, 1, 0.5),
        (["x"], ["y"]),
    ]
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("jobs", [0, -1, 99999999999])
def test_a_number_of_jobs_that_no_machine_holds(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"at (least 1|most \d+ on this machine).*got {jobs}"):
        execute(make_study({"base": {}}), runs=tmp_path / "runs", jobs=jobs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "base",
    [
        {"data": {"name": "digits"}},
        {"evaluate": {"split": "validation"}},
        {"train": {"batch_size": 1}},
        {"kind": "continual", "scenario": {"num_experiences": 11}},
    ],
)
def test_a_study_of_which_no_run_can_be_made_leaves_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    study = make_study({"base": base, "grid": {"seed": [1, 2]}})
    outcome = execute(study, runs=tmp_path / "a" / "runs", jobs=1)
    assert len(outcome.failures) == 2
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "there"
    folder.mkdir()
    execute(study, runs=folder, jobs=1)
    assert list(folder.iterdir()) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    study = make_study({"base": {"data": {"name": "digits"}}})
    execute(study, runs=tmp_path, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".study.lock", "notes", "study.json"]


@pytest.mark.parametrize("key", ["model.name", "data.name", "norm.name", "strategy.name"])
def test_an_unknown_name_is_refused_before_a_process_is_started(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(FedNormError, match="'nope'"):
        make_study({"base": {section: {name: "nope"}}})


def test_only_a_script_is_told_of_its_main_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    main = type(worker)("__main__")
    monkeypatch.setitem(worker.sys.modules, "__main__", main)
    main.__file__ = "/home/someone/study.py"
    assert "__main__" in worker._remedy()
    main.__file__ = "/usr/bin/fednorm"
    assert worker._remedy() == "Let the runs be made one at a time, in this process: --jobs 1."
