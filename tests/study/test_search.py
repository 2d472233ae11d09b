"""Searches beyond a grid: ranges and draws, one budget for all, seeded and gone on with; Optuna where it is there."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fednorm.config import RunConfig
from fednorm.errors import ConfigError
from fednorm.study import runner
from fednorm.study.runner import execute
from fednorm.study.search import Range
from fednorm.study.study import Study, make_study
from fednorm.study.worker import Ended

BASE = {"kind": "federated", "model": {"width": 4}, "rounds": {"num_rounds": 1}}
RATE = {"train": {"learning_rate": {"low": 0.001, "high": 1.0, "log": True}}}
POINTS = [{"strategy": {"name": "fedavg"}}, {"strategy": {"name": "fedbn"}}]


def study(search: Mapping[str, Any] | None = None, **tables: Any) -> Study:
    document = {
        "base": BASE,
        "points": POINTS,
        "search": search if search is not None else {"method": "random", "budget": 5, **RATE},
        "select": {"data": {"validation": 0.2}},
        "grid": {"seed": [1]},
        **tables,
    }
    return make_study(document)


def rates(made: Study, method: int = 0) -> list[float]:
    return [candidate.keys["train", "learning_rate"] for candidate in made.searches[method]]


# Ranges ---------------------------------------------------------------------------------------------------------------


def test_a_range_is_uniform_in_the_number_or_its_logarithm() -> None:
    assert [Range(0, 10).at(u) for u in (0, 0.25, 0.5)] == [0, 2.5, 5]
    assert [Range(0.001, 1.0, log=True).at(u) for u in (0, 1 / 3, 2 / 3)] == pytest.approx([0.001, 0.01, 0.1])
    shares = np.random.default_rng(0).random(20_000)
    logs = [math.log10(Range(0.001, 1.0, log=True).at(u)) for u in shares]
    assert np.histogram(logs, bins=3, range=(-3, 0))[0] / 20_000 == pytest.approx([1 / 3] * 3, abs=0.02)
    whole = Counter(Range(3, 6, whole=True).at(u) for u in shares)
    assert sorted(whole) == [3, 4, 5, 6]
    assert all(count == pytest.approx(5000, rel=0.08) for count in whole.values())
    doubled = Counter(Range(1, 7, log=True, whole=True).at(u) for u in shares)
    assert doubled[1] / 20_000 == pytest.approx(math.log(2) / math.log(8), abs=0.02)


def test_a_float_is_one_that_a_file_can_hold_and_stays_within() -> None:
    values = [Range(0.0123456, 0.98765, log=True).at(u) for u in np.linspace(0, 1, 50, endpoint=False)]
    assert all(value == float(f"{value:.4g}") for value in values)
    assert 0.0123456 <= min(values) < max(values) <= 0.98765
    assert Range(0.0123449, 0.5).at(0.0) == 0.0123449  # and not 0.01234, which is less


# Random ---------------------------------------------------------------------------------------------------------------


def test_every_method_tries_the_same_draws_and_as_many() -> None:
    made = study()
    assert len(made.searches) == 2
    assert rates(made, 0) == rates(made, 1)
    assert len(set(rates(made))) == 5
    assert all(0.001 <= rate <= 1 for rate in rates(made))
    assert made.rule.endswith(" Drawn at random, seed 0.")


def test_a_larger_budget_begins_with_a_smaller_one_s_runs() -> None:
    small, large = study(), study({"method": "random", "budget": 9, **RATE})
    assert rates(large)[:5] == rates(small)
    assert {c.hash for c in small.search_configs} < {c.hash for c in large.search_configs}
    assert rates(study({"method": "random", "budget": 5, "seed": 1, **RATE})) != rates(small)


def test_a_key_s_draws_do_not_depend_on_other_keys() -> None:
    both = study({"method": "random", "budget": 5, "train": {**RATE["train"], "batch_size": [8, 16, 32]}})
    assert rates(both) == rates(study())
    assert {c.keys["train", "batch_size"] for c in both.searches[0]} <= {8, 16, 32}


def test_a_method_s_own_range_takes_the_place_of_the_shared_one() -> None:
    own = {"train": {"learning_rate": {"low": 2.0, "high": 3.0}}}
    made = study(points=[POINTS[0], {**POINTS[1], "search": own}])
    assert all(2 <= rate <= 3 for rate in rates(made, 1))
    assert all(rate <= 1 for rate in rates(made, 0))
    fixed = study(points=[POINTS[0], {**POINTS[1], "search": {"train": {"learning_rate": [0.1, 0.2, 0.3, 0.4, 0.5]}}}])
    assert sorted(rates(fixed, 1)) == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_lists_are_drawn_from_without_repeating_a_configuration() -> None:
    made = study({"method": "random", "budget": 6, "train": {"batch_size": [8, 16, 32], "momentum": [0.0, 0.9]}})
    assert len({repr(candidate.keys) for candidate in made.searches[0]}) == 6


def test_a_key_that_is_set_for_all_is_not_searched() -> None:
    made = make_study(
        {"base": BASE, "search": {"method": "random", "budget": 3, **RATE}, "select": {"data": {"validation": 0.2}}},
        overrides={"train": {"learning_rate": 0.5}},
    )
    assert [candidate.keys for candidate in made.searches[0]] == [{}]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"method": "bayes", **RATE}, r"search\.method is one of grid, random, optuna; got 'bayes'"),
        ({"method": "random", **RATE}, r"needs search\.budget, the number of configurations of every method, from 1"),
        ({"method": "random", "budget": 0, **RATE}, "needs search.budget"),
        ({"method": "random", "budget": 2.5, **RATE}, r"search\.budget is a whole number of 0 or more; got 2\.5"),
        ({"method": "random", "budget": True, **RATE}, r"search\.budget is a whole number"),
        ({"method": "random", "budget": 20_000, **RATE}, "from 1 to 10,000; got 20000"),
        ({"method": "random", "budget": 2, "seed": 1.5, **RATE}, r"search\.seed is a whole number .*; got 1\.5"),
        ({"method": "random", "budget": 2, "seed": "a", **RATE}, r"search\.seed is a whole number .*; got 'a'"),
        ({"method": "random", "budget": 5, "train": {"learning_rate": {"min": 1, "max": 2}}}, "is a range .* got .'min'"),
        ({"train": {"learning_rate": {"min": 0.1, "max": 1}}}, "is a range, of which a grid has no list"),
        ({"budget": 4, "train": {"learning_rate": [0.1]}}, "a grid tries every combination"),
        (RATE, r"search\.train\.learning_rate is a range, of which a grid has no list"),
        ({"method": "random", "budget": 5}, "names no key to choose"),
        ({"method": "random", "budget": 5, "train": {"batch_size": [8, 16]}}, "its lists and ranges make 2 conf"),
        ({"method": "random", "budget": 5, "train": {"batch_size": {"low": 1, "high": 3}}}, "make 3 configurations"),
        ({"method": "random", "budget": 5, "train": {"learning_rate": {"low": 1.0}}}, r"is a range \{ low = NUMBER"),
        ({"method": "random", "budget": 5, "train": {"learning_rate": {"low": 2, "high": 1}}}, "needs low below high"),
        (
            {"method": "random", "budget": 5, "train": {"learning_rate": {"low": 0, "high": 1, "log": True}}},
            "needs low above 0 and below high; got low = 0, high = 1",
        ),
        ({"method": "random", "budget": 5, "train": {"learning_rate": {"low": 0, "high": 1, "base": 2}}}, "is a range"),
        ({"method": "random", "budget": 5, "train": {"learning_rat": {"low": 0.1, "high": 1}}}, "learning_rate"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(search)


def test_several_tables_are_a_grid_s() -> None:
    tables = [{"train": {"learning_rate": [0.1]}}, {"train": {"learning_rate": [0.2]}}]
    with pytest.raises(ConfigError, match=r'one table where search\.method is "random"; got 2'):
        study(points=[POINTS[0], {**POINTS[1], "search": tables}])


# Optuna ---------------------------------------------------------------------------------------------------------------


def result(config: RunConfig) -> dict[str, Any]:
    """Return what a run would give: the best rate is 0.1 of fedavg, 0.01 of fedbn."""
    best = 0.1 if config.strategy.name == "fedavg" else 0.01
    score = 1 / (1 + abs(math.log10(config.train.learning_rate / best)))
    return {
        "kind": "federated",
        "hash": config.hash,
        "config": config.to_dict(),
        "final": {"mean": score, "per_domain": {"a": score}, "worst": score},
        "seconds": 0.0,
        "data": {"title": "pretended", "notes": []},
        "run": "",
    }


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs that give a score at once, are kept, and are counted; rates above 0.9 diverge."""
    made: list[RunConfig] = []
    kept: dict[tuple[str, str], dict[str, Any]] = {}

    class Record:
        def __init__(self, runs: Path, config: RunConfig) -> None:
            self.key = (str(runs), config.hash)

        def result(self) -> dict[str, Any] | None:
            return kept.get(self.key)

    def attempt(config: RunConfig, runs: Path, *_: Any) -> Ended:
        made.append(config)
        if config.train.learning_rate > 0.9:
            return Ended(None, "it diverged", "AggregationError")
        kept[str(runs), config.hash] = result(config)
        return Ended(kept[str(runs), config.hash], "")

    monkeypatch.setattr(runner, "RunRecord", Record)
    monkeypatch.setattr(runner, "attempt", attempt)
    return made


def optuna_study(budget: int = 12, **tables: Any) -> Study:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    return study({"method": "optuna", "budget": budget, **RATE}, **tables)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "fednorm\[optuna\]".*search\.method = "random"'):
        study({"method": "optuna", "budget": 3, **RATE})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optuna_learns_from_scores_within_the_same_budget(pretended: list[RunConfig], tmp_path: Path) -> None:
    outcome = execute(optuna_study(), runs=tmp_path / "a", jobs=1)
    assert outcome.failures == []
    tried = [config for config in pretended if config.data.validation]
    assert Counter(config.strategy.name for config in tried) == {"fedavg": 12, "fedbn": 12}
    chosen = {
        choice["method"]: choice["keys"]["train.learning_rate"] for choice in outcome.manifest["selection"]["chosen"]
    }
    assert abs(math.log10(chosen["fedavg"] / 0.1)) < 0.4
    assert abs(math.log10(chosen["fedbn"] / 0.01)) < 0.4
    assert outcome.manifest["selection"]["rule"].endswith("Proposed by Optuna's TPE, seed 0.")
    assert outcome.manifest["selection"]["configurations"] == 12
    late = [abs(math.log10(c.train.learning_rate / 0.01)) for c in tried if c.strategy.name == "fedbn"]
    assert np.mean(late[6:]) < np.mean(late[:4])  # it learned: the first third was drawn


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optuna_goes_on_where_it_was_cut_short(
    pretended: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = execute(optuna_study(8), runs=tmp_path / "whole", jobs=1)
    order = [config.hash for config in pretended]
    pretended.clear()
    attempt = runner.attempt

    def stop(config: RunConfig, *rest: Any) -> Ended:
        if len(pretended) == 7:
            raise KeyboardInterrupt
        return attempt(config, *rest)

    monkeypatch.setattr(runner, "attempt", stop)
    cut = execute(optuna_study(8), runs=tmp_path / "cut", jobs=1)
    assert cut.interrupted
    assert cut.manifest["selection"]["chosen"] == []
    monkeypatch.setattr(runner, "attempt", attempt)
    done = execute(optuna_study(8), runs=tmp_path / "cut", jobs=1)
    assert [config.hash for config in pretended] == order
    assert done.manifest["selection"]["chosen"] == whole.manifest["selection"]["chosen"]
    pretended.clear()
    execute(optuna_study(8), runs=tmp_path / "cut", jobs=1)
    assert pretended == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_diverged_is_scored_nothing_and_not_run_again(pretended: list[RunConfig], tmp_path: Path) -> None:
    wide = {"train": {"learning_rate": {"low": 0.5, "high": 1.5}}}
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    made = study({"method": "optuna", "budget": 6, **wide}, points=POINTS[:1])
    outcome = execute(made, runs=tmp_path, jobs=1)
    assert outcome.failures == []
    assert outcome.manifest["selection"]["diverged"]
    count = len(pretended)
    again = execute(study({"method": "optuna", "budget": 6, **wide}, points=POINTS[:1]), runs=tmp_path, jobs=1)
    assert len(pretended) == count
    assert again.manifest["selection"]["chosen"] == outcome.manifest["selection"]["chosen"]


def test_the_manifest_of_a_grid_is_as_it_was() -> None:
    made = study({"train": {"learning_rate": [0.1, 0.2]}})
    assert made.rule == "Chosen by the mean validation accuracy over domains."
    assert made.adaptive is None
