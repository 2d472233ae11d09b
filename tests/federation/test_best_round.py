"""The round that is best on images held back: chosen on validation, told on test, beside the last."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federation.best_round import best_round
from fednorm.federation.simulate import plan, simulate
from fednorm.records.results import load
from fednorm.report.table import accuracy_table

VALUES: dict[str, Any] = {
    "data": {"train_per_client": 30, "test_per_domain": 12, "validation": 0.4},
    "model": {"width": 4},
    "strategy": {"name": "silobn"},
    "train": {"batch_size": 8, "learning_rate": 0.2},
    "rounds": {"num_rounds": 4},
    "evaluate": {"best_round": True, "kinds": "own,averaged"},
}


def line(number: int, validation: dict[str, float], test: dict[str, float]) -> dict[str, Any]:
    def scores(of: dict[str, float]) -> dict[str, Any]:
        return {"per_domain": of, "mean": sum(of.values()) / len(of), "worst": min(of.values())}

    return {"round": number, **scores(test), "validation": scores(validation)}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_validation_chooses_and_the_first_of_equals_wins(rounds: list[tuple[int, int, float]]) -> None:
    lines = [line(n, {"a": a / 4, "b": b / 4}, {"a": t, "b": t}) for n, (a, b, t) in enumerate(rounds, start=1)]
    sums = [a + b for a, b, _ in rounds]
    where = sums.index(max(sums))
    best = best_round([{"round": 0}, *lines])
    assert best is not None
    assert best["round"] == where + 1
    assert best["validation_mean"] == max(sums) / 8
    assert best["per_domain"] == {"a": rounds[where][2], "b": rounds[where][2]}


def test_a_round_without_a_domain_is_no_candidate() -> None:
    lines = [line(1, {"a": 0.5, "b": 0.1}, {"a": 0.5, "b": 0.2}), line(2, {"a": 0.9}, {"a": 0.9})]
    best = best_round(lines)
    assert best is not None
    assert best["round"] == 1
    assert best_round([{"round": 1, "mean": 0.3}]) is None


def test_the_best_round_stands_beside_the_last(tmp_path: Any) -> None:
    result = simulate(resolve(VALUES), runs=tmp_path)
    other = simulate(resolve({**VALUES, "evaluate": {"kinds": "own,averaged"}}), runs=None)
    final = dict(result["final"])
    best = final.pop("best_round")
    assert final == other["final"]
    assert result["evaluation"] == other["evaluation"]
    means = [each["validation"]["mean"] for each in result["rounds"]]
    assert best["validation_mean"] == max(means)
    assert best["round"] == means.index(max(means)) + 1
    chosen = result["rounds"][best["round"] - 1]
    assert {key: best[key] for key in ("mean", "worst", "per_domain")} == {
        key: chosen[key] for key in ("mean", "worst", "per_domain")
    }
    (read,) = load([tmp_path]).results
    assert read["final"]["best_round"] == best
    told = f"best round by validation images ({best['round']}): mean {100 * best['mean']:.1f}"
    assert any(told in note for note in accuracy_table([read]).notes)


def test_validation_scores_are_those_of_the_images_held_back() -> None:
    """With images held back as the scored split, the same run has them as its own scores."""
    ours = simulate(resolve(VALUES), runs=None)
    theirs = simulate(resolve({**VALUES, "evaluate": {"split": "validation"}}), runs=None)
    for a, b in zip(ours["rounds"], theirs["rounds"], strict=True):
        assert a["validation"] == {key: b[key] for key in ("per_domain", "mean", "worst")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"validation": 0.0}}, "data.validation holds none back"),
        ({"evaluate": {"best_round": True, "split": "validation"}}, "Leave one of the two out"),
    ],
)
def test_without_images_to_choose_by_it_is_refused_before_training(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(resolve({**VALUES, **change}))
