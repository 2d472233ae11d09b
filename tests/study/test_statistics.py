"""Statistics against formulas written out, exact enumeration, tables worked by hand, and simulated coverage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednorm.errors import ConfigError, DataError
from fednorm.study.statistics import METHODS, Interval, interval, mean_ranks, paired_difference

T_975 = {2: 12.7062047361747, 3: 4.30265272974946, 5: 2.77644510519779}
"""Quantiles of Student's t for n values, from a printed table (n - 1 degrees of freedom)."""

shares = st.floats(0, 1, allow_nan=False, width=32)


@pytest.mark.parametrize("values", [[0.61, 0.64], [0.5, 0.6, 0.8], [0.91, 0.9, 0.93, 0.95, 0.87]])
def test_a_t_interval_is_its_formula(values: Sequence[float]) -> None:
    n = len(values)
    mean = sum(values) / n
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = T_975[n] * std / math.sqrt(n)
    found = interval(values)
    assert (found.n, found.method, found.level) == (n, "t", 0.95)
    assert [found.mean, found.std, found.low, found.high] == pytest.approx([mean, std, mean - half, mean + half])


def test_a_spread_that_underflows_gives_no_nan() -> None:
    tiny = 5e-324
    found = interval([0.0, 0.0, 0.0, 0.0, 0.0, tiny])
    assert found.low is not None
    assert found.high is not None
    assert -10 * tiny <= found.low <= found.high <= 10 * tiny


def test_an_interval_of_a_lower_level_is_shorter() -> None:
    wide, narrow = interval([0.5, 0.6, 0.8]), interval([0.5, 0.6, 0.8], level=0.5)
    assert narrow.high is not None
    assert wide.high is not None
    assert narrow.high - narrow.mean == pytest.approx(0.816496580927726 * 0.152752523165195 / math.sqrt(3))  # t_{2,.75}
    assert narrow.high < wide.high


@pytest.mark.parametrize("values", [[0.2, 0.3, 0.5, 0.9], [0.61, 0.64, 0.6, 0.7, 0.66]])
def test_a_bootstrap_interval_is_that_of_all_resamples(values: Sequence[float]) -> None:
    means = np.sort([np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))])
    found = interval(values, method="bootstrap")
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        near = [means[round((share + off) * (len(means) - 1))] for off in (-0.006, 0.006)]  # 4 standard errors
        assert near[0] <= end <= near[1]
    assert (found.mean, found.std) == (interval(values).mean, interval(values).std)


def test_a_bootstrap_of_three_values_is_their_range() -> None:
    found = interval([0.7, 0.5, 0.6], method="bootstrap")  # all three draws hit the least in 1 of 27 > 2.5 %
    assert [found.low, found.high] == pytest.approx([0.5, 0.7])


@pytest.mark.parametrize("method", METHODS)
def test_one_value_has_no_interval(method: str) -> None:
    assert interval([0.7], method=method) == Interval(1, 0.7, None, None, None, method, 0.95)


@pytest.mark.parametrize("method", METHODS)
@given(value=shares, count=st.integers(2, 7))
@settings(deadline=None)  # scipy's first import
def test_equal_values_have_an_interval_of_no_width(method: str, value: float, count: int) -> None:
    assert interval([value] * count, method=method) == Interval(count, value, 0.0, value, value, method, 0.95)


@pytest.mark.parametrize("method", METHODS)
@given(values=st.lists(shares, min_size=2, max_size=6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_interval_is_ordered_and_the_order_of_runs_is_no_matter(
    method: str, values: list[float], data: st.DataObject
) -> None:
    found = interval(values, method=method)
    assert found.low is not None
    assert found.high is not None
    assert found.low - 1e-12 <= found.mean <= found.high + 1e-12
    assert interval(data.draw(st.permutations(values)), method=method) == found


@given(values=st.lists(shares, min_size=2, max_size=6), scale=st.floats(0.5, 100), shift=st.floats(-5, 5))
@settings(deadline=None)
def test_an_interval_moves_and_stretches_with_its_values(values: list[float], scale: float, shift: float) -> None:
    plain, moved = interval(values), interval([scale * value + shift for value in values])
    ends = [plain.mean, plain.low, plain.high]
    assert [moved.mean, moved.low, moved.high] == pytest.approx(
        [scale * end + shift for end in ends if end is not None], rel=1e-6, abs=1e-6
    )


def test_t_covers_what_it_says_and_the_bootstrap_of_few_seeds_does_not() -> None:
    rng = np.random.default_rng(0)

    def coverage(method: str, draws: int) -> float:
        found = [interval(list(rng.normal(0.6, 0.02, 3)), method=method) for _ in range(draws)]
        return float(np.mean([f.low is not None and f.high is not None and f.low <= 0.6 <= f.high for f in found]))

    assert coverage("t", 1000) == pytest.approx(0.95, abs=0.03)  # four standard errors
    assert coverage("bootstrap", 200) == pytest.approx(0.75, abs=0.12)  # of three values: 1 - 2 / 2^3, their range


def test_a_paired_difference_worked_by_hand() -> None:
    found = paired_difference({1: 0.70, 2: 0.80, 3: 0.60, 9: 0.1}, {3: 0.60, 2: 0.74, 1: 0.67, 4: 0.9})
    assert found is not None
    assert (found.n, found.better, found.worse, found.ties) == (3, 2, 0, 1)
    half = T_975[3] * 0.03 / math.sqrt(3)  # differences 0.03, 0.06, 0.00
    assert [found.mean, found.low, found.high] == pytest.approx([0.03, 0.03 - half, 0.03 + half])


def test_lower_can_be_better() -> None:
    scores, baseline = {1: 0.1, 2: 0.3, 3: 0.3}, {1: 0.2, 2: 0.2, 3: 0.2}
    higher, lower = (paired_difference(scores, baseline, better=better) for better in (1, -1))
    assert higher is not None
    assert lower is not None
    assert (higher.better, higher.worse, higher.ties) == (2, 1, 0)
    assert (lower.better, lower.worse, lower.ties) == (1, 2, 0)
    assert (higher.mean, higher.low) == (lower.mean, lower.low)  # score minus baseline, whatever is better


def test_differences_of_one_common_seed_and_of_none() -> None:
    one = paired_difference({1: 0.5, 2: 0.5}, {2: 0.25}, method="bootstrap")
    assert one is not None
    assert (one.n, one.mean, one.low, one.high, one.better, one.method) == (1, 0.25, None, None, 1, "bootstrap")
    assert paired_difference({1: 0.5}, {2: 0.5}) is None
    assert paired_difference({}, {}) is None


def test_pairing_takes_out_what_seeds_share() -> None:
    """Seeds that scatter by 30 points and a method that gains one in each: only pairing shows it."""
    baseline = {1: 0.3, 2: 0.6, 3: 0.9}
    found = paired_difference({seed: score + 0.01 + seed / 1000 for seed, score in baseline.items()}, baseline)
    assert found is not None
    assert found.low is not None
    assert found.low > 0
    apart = interval(list(baseline.values()))
    assert apart.low is not None
    assert apart.low < 0.3


def test_mean_ranks_worked_by_hand() -> None:
    scores = {
        "a": {"x": 0.9, "y": 0.5, "z": 0.7},
        "b": {"x": 0.8, "y": 0.5, "z": 0.9},
        "c": {"x": 0.7, "y": 0.4, "z": 0.8, "only here": 1.0},
    }
    assert mean_ranks(scores) == pytest.approx({"a": (1 + 1.5 + 3) / 3, "b": (2 + 1.5 + 1) / 3, "c": (3 + 3 + 2) / 3})


def test_ranks_of_nothing_in_common() -> None:
    assert mean_ranks({}) == {}
    assert mean_ranks({"a": {"x": 0.1}, "b": {"y": 0.2}}) == {}


@given(st.lists(st.lists(shares, min_size=3, max_size=3), min_size=1, max_size=6))
@settings(deadline=None)
def test_ranks_share_out_the_same_places(table: list[list[float]]) -> None:
    ranks = mean_ranks({str(row): dict(zip("xyz", scores, strict=True)) for row, scores in enumerate(table)})
    assert sum(ranks.values()) == pytest.approx(len(table) * (len(table) + 1) / 2)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(odd: float) -> None:
    with pytest.raises(DataError, match=r"must be finite.*got (nan|-?inf) among 2 values"):
        interval([0.5, odd])
    with pytest.raises(DataError, match="must be finite"):
        paired_difference({1: odd, 2: 0.5}, {1: 0.1, 2: 0.5})
    with pytest.raises(DataError, match="must be finite"):
        mean_ranks({"a": {"x": odd}, "b": {"x": 0.5}})


def test_what_cannot_be_asked_is_said() -> None:
    with pytest.raises(DataError, match="one value or more; got none"):
        interval([])
    with pytest.raises(ConfigError, match="by t or bootstrap; got 'bca'"):
        interval([0.5], method="bca")
    with pytest.raises(ConfigError, match=r"between 0 and 1, e\.g\. 0\.95; got 95"):
        paired_difference({1: 0.5}, {1: 0.5}, level=95)
    with pytest.raises(DataError, match="got 0"):
        paired_difference({1: 0.5}, {1: 0.5}, better=0)
