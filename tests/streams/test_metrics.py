"""Metrics of an accuracy matrix: hand-made matrices, identities, and what mammoth and Avalanche computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fednorm.errors import ConfigError, DataError
from fednorm.streams import metrics
from fednorm.verify.golden import Status, replay

GOLDEN = Path(__file__).parents[1] / "golden"
TRACE = GOLDEN / "cl_metrics.npz"

NAN = float("nan")
R = [
    [0.8, 0.3, 0.1],
    [0.9, 0.7, 0.2],
    [0.5, 0.6, 1.0],
]
"""Experience 0 is at its best after experience 1, so that the two conventions of forgetting differ."""

matrices = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 1, width=32)))


def close(value: float) -> Any:
    return pytest.approx(value, abs=1e-12)


def test_every_metric_of_a_matrix_worked_by_hand() -> None:
    assert metrics.average_accuracy(R) == close((0.5 + 0.6 + 1.0) / 3)
    assert metrics.average_incremental_accuracy(R) == close((0.8 + (0.9 + 0.7) / 2 + (0.5 + 0.6 + 1.0) / 3) / 3)
    assert metrics.forgetting_max_minus_last(R) == close((0.4 + 0.1) / 2)
    assert metrics.forgetting_first_minus_last(R) == close((0.3 + 0.1) / 2)
    assert metrics.backward_transfer(R) == close(-0.2)
    assert metrics.forward_transfer(R, [0.1, 0.2, 0.15]) == close(((0.3 - 0.2) + (0.2 - 0.15)) / 2)


def test_max_minus_last_counts_the_accuracy_before_an_experience_only_when_asked() -> None:
    helped_then_ruined = [[0.5, 0.9], [0.5, 0.4]]
    assert metrics.forgetting_max_minus_last(helped_then_ruined) == close(0)
    three = [[0.5, 0.9, 0], [0.5, 0.4, 0], [0.5, 0.3, 0.1]]
    assert metrics.max_minus_last_by_experience(three).tolist() == [0, close(0.1)]
    assert metrics.max_minus_last_by_experience(three, zero_shot=True).tolist() == [0, close(0.6)]


def test_a_stream_that_has_not_ended_is_measured_on_what_it_has_seen() -> None:
    assert metrics.average_accuracy(R[:2]) == close(0.8)
    assert metrics.forgetting_first_minus_last(R[:2]) == close(-0.1)
    assert metrics.average_incremental_accuracy(R[:1]) == close(0.8)
    for zero in (metrics.forgetting_max_minus_last, metrics.forgetting_first_minus_last, metrics.backward_transfer):
        assert zero(R[:1]) == 0
    assert metrics.forward_transfer(R[:1], [0.1, 0.1, 0.1]) == 0


def test_what_a_formula_does_not_use_may_be_missing() -> None:
    lower = [[0.8, NAN, NAN], [0.9, 0.7, NAN], [0.5, 0.6, 1.0]]
    assert metrics.average_accuracy(lower) == metrics.average_accuracy(R)
    assert metrics.average_incremental_accuracy(lower) == metrics.average_incremental_accuracy(R)
    assert metrics.forgetting_max_minus_last(lower) == metrics.forgetting_max_minus_last(R)
    with pytest.raises(DataError, match=r"forward transfer needs accuracies that are missing \(NaN\)"):
        metrics.forward_transfer(lower, [0, 0, 0])


@given(matrices)
@settings(max_examples=60, deadline=None)
def test_identities(r: np.ndarray) -> None:
    assert metrics.backward_transfer(r) == -metrics.forgetting_first_minus_last(r)
    assert (metrics.max_minus_last_by_experience(r) >= 0).all()
    assert (metrics.max_minus_last_by_experience(r) >= metrics.first_minus_last_by_experience(r)).all()
    assert metrics.forgetting_max_minus_last(100 * r) == pytest.approx(100 * metrics.forgetting_max_minus_last(r))
    n = len(r)
    if n > 1:
        diagonal = np.diagonal(r)[:-1].mean()
        rest = (metrics.average_accuracy(r) * n - r[-1, -1]) / (n - 1)
        assert diagonal - rest == pytest.approx(metrics.forgetting_first_minus_last(r), abs=1e-9)
    constant = np.full((n, n), r[0, 0])
    assert metrics.average_accuracy(constant) == pytest.approx(metrics.average_incremental_accuracy(constant))
    assert metrics.forgetting_max_minus_last(constant) == 0


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=20))
def test_online_accuracy_weighs_samples_and_not_batches(pairs: list[tuple[int, int]]) -> None:
    seen = [right + wrong for right, wrong in pairs]
    correct = [right for right, _ in pairs]
    if not sum(seen):
        with pytest.raises(DataError, match="one new sample or more"):
            metrics.online_accuracy(correct, seen)
        return
    every = np.concatenate([[1.0] * right + [0.0] * wrong for right, wrong in pairs])
    assert metrics.online_accuracy(correct, seen) == pytest.approx(every.mean())


def test_plasticity_is_the_mean_over_the_last_experiences() -> None:
    values = [0.0] * 18 + [0.4, 0.8]
    assert metrics.plasticity(values) == close(0.6)
    assert metrics.plasticity(values, share=1.0) == close(0.06)
    assert metrics.plasticity([0.3, 0.7]) == close(0.7)
    with pytest.raises(ConfigError, match=r"\(0, 1\]; got 0"):
        metrics.plasticity(values, share=0)


@pytest.mark.parametrize("bad", [[], [0.1], [[0.1], [0.2]], [[[0.1]]]])
def test_what_is_no_matrix_is_refused(bad: Any) -> None:
    with pytest.raises(DataError, match="at least as many columns as rows"):
        metrics.average_accuracy(bad)


def test_mistakes_are_told() -> None:
    with pytest.raises(DataError, match="average accuracy needs accuracies that are missing"):
        metrics.average_accuracy([[NAN]])
    with pytest.raises(DataError, match=r"each of 3 experiences; got shape \(2,\)"):
        metrics.forward_transfer(R, [0.1, 0.1])
    with pytest.raises(DataError, match="how many of its samples were right"):
        metrics.online_accuracy([3], [2])


def recorded() -> dict[str, Any]:
    with np.load(TRACE, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def test_the_recorded_metrics_are_reproduced() -> None:
    outcome = replay(TRACE)
    assert (outcome.status, outcome.largest_error) == (Status.PASS, 0.0), outcome.detail
    assert outcome.detail.startswith("8 arrays reproduced")
    results = {key for key in recorded() if key.startswith(("mammoth.", "avalanche."))}
    assert len(results) == 8 + sum(f"mammoth.{name}_after_call" in outcome.detail for name in PADDED)


PADDED = ("lower_triangle", "future_rows")


def test_a_change_in_any_recorded_metric_is_seen(tmp_path: Path) -> None:
    arrays = recorded()
    for key in [k for k in arrays if k.startswith(("mammoth.", "avalanche.")) and not k.endswith("_after_call")]:
        altered = arrays[key].copy()
        altered.reshape(-1)[-1] += 1e-6
        np.savez(tmp_path / "altered.npz", **{**arrays, key: altered})
        outcome = replay(tmp_path / "altered.npz")
        assert outcome.status is Status.FAIL
        assert key in outcome.detail
