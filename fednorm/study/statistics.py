"""Statistics over seeds: means with intervals, paired differences, ranks over domains.

A seed is the unit of replication: its run draws initial weights, the order of images and, where a study deals data at
random, the data anew. All intervals are of a mean over such runs; they say nothing of other data.

Every function takes scores as they are (shares stay shares) and gives its numbers in the same unit. Scores that are
missing or not finite are the caller's to leave out and to count: they are refused here, so that no NaN ever enters a
mean unseen.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

from fednorm.errors import ConfigError, DataError

METHODS: Mapping[str, str] = {
    "t": "Student's t",
    "bootstrap": "percentile bootstrap",
}
"""How an interval of a mean may be made, and what a caption calls it."""

RESAMPLES = 9_999
"""Resamples of a bootstrap."""

LEVEL = 0.95
"""The level of intervals where none is asked for."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and how sure it is.

    Attributes:
        n: How many values it is a mean of.
        mean: Their arithmetic mean.
        std: Their sample standard deviation, with n - 1; None for a single value.
        low: Lower end of the interval of the mean; None for a single value.
        high: Upper end; None for a single value.
        method: How the interval was made, a key of :data:`METHODS`.
        level: Its nominal coverage, e.g. 0.95.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None
    method: str
    level: float


@dataclass(frozen=True)
class Difference:
    """How a method's scores differ from the baseline's, seed by seed.

    Attributes:
        n: Seeds that both have.
        mean: Mean of score minus the baseline's score.
        low: Lower end of the interval of that mean; None for a single seed.
        high: Upper end; None for a single seed.
        better: Seeds in which the method is better than the baseline.
        worse: Seeds in which it is worse.
        ties: Seeds in which both score exactly the same.
        method: How the interval was made, a key of :data:`METHODS`.
        level: Its nominal coverage.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    better: int
    worse: int
    ties: int
    method: str
    level: float

    @property
    def shows_nothing(self) -> bool:
        """Whether these seeds leave open which of the two is better: the interval holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def interval(
    values: Sequence[float], *, method: str = "t", level: float = LEVEL, within: tuple[float, float] | None = None
) -> Interval:
    r"""Return the mean of values with its standard deviation and an interval.

    ``t`` is Student's: :math:`\bar x \pm t_{n-1,(1+\text{level})/2} \, s / \sqrt n`, exact where runs scatter normally.
    Where the mean cannot lie outside of bounds, as that of shares cannot outside of 0 and 1, ``within`` cuts it there:
    that takes away nothing that could be true, so its coverage stays what it is.

    ``bootstrap`` is the percentile bootstrap of the mean (Efron and Tibshirani 1993, chapter 13) over
    :data:`RESAMPLES` resamples from a fixed random stream, so that the same values, in any order, give the same
    interval. The bias-corrected accelerated one (BCa) is not offered: its correction is made of the share of resamples
    below the mean and of a jackknife skewness, which with three to five values are mostly noise, and are undefined as
    soon as that share is 0 or 1. The percentile interval is always defined, but for few values it is too short: it
    lacks both the factor :math:`\sqrt{n/(n-1)}` and t's heavier tails, and never leaves the range of the values.

    Args:
        values: One finite number a seed; one or more.
        method: ``t`` or ``bootstrap``.
        level: Nominal coverage, in (0, 1).
        within: What the mean can be at least and at most; None where there are no bounds.

    Returns:
        The mean and its interval. One value has neither deviation nor interval; values that are all equal have an
        interval of width 0.

    Raises:
        ConfigError: An unknown method, or a level outside (0, 1).
        DataError: No value, or one that is not finite.
    """
    _check(method, level)
    ordered = _finite(values)
    if ordered[0] == ordered[-1]:  # summing and dividing could round the mean of equal values away from them
        spread = None if len(ordered) == 1 else 0.0
        end = None if spread is None else ordered[0]
        return Interval(len(ordered), ordered[0], spread, end, end, method, level)
    mean, std = fmean(ordered), stdev(ordered)
    low, high = _student(ordered, mean, std, level) if method == "t" else _percentile(ordered, level)
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return Interval(len(ordered), mean, std, low, high, method, level)


def paired_difference(
    scores: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    method: str = "t",
    level: float = LEVEL,
    better: int = 1,
    within: tuple[float, float] | None = None,
) -> Difference | None:
    """Return the mean difference to a baseline over the seeds that both have, with its interval and signs.

    Runs of one seed share the initial weights and the data as far as their methods let them; pairing takes what they
    share out of the comparison.

    Args:
        scores: A finite score for each seed.
        baseline: The baseline's.
        method: How the interval is made, as for :func:`interval`.
        level: Nominal coverage, in (0, 1).
        better: 1 where a higher score is better, -1 where a lower one is.
        within: What a mean difference can be at least and at most, as for :func:`interval`.

    Returns:
        The difference, score minus baseline; None where no seed is in both.

    Raises:
        ConfigError: An unknown method, or a level outside (0, 1).
        DataError: A score that is not finite, or a direction that is neither 1 nor -1.
    """
    _check(method, level)
    if better not in (1, -1):
        raise DataError(f"better is 1 where higher scores are better, and -1 where lower ones are; got {better!r}.")
    common = sorted(scores.keys() & baseline.keys())
    if not common:
        return None
    differences = [scores[seed] - baseline[seed] for seed in common]
    found = interval(differences, method=method, level=level, within=within)
    ahead = sum(better * difference > 0 for difference in differences)
    ties = sum(difference == 0 for difference in differences)
    behind = len(differences) - ahead - ties
    return Difference(found.n, found.mean, found.low, found.high, ahead, behind, ties, method, level)


def mean_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each method's mean rank over the domains that all methods have.

    In each domain the best score has rank 1, and methods that tie share the mean of their ranks (Demšar 2006,
    https://jmlr.org/papers/v7/demsar06a.html). Higher scores are better.

    Args:
        scores: For each method, its score in each domain.

    Returns:
        A mean rank in [1, number of methods] for each method; empty where no domain is common to all.

    Raises:
        DataError: A score that is not finite.
    """
    domains = set.intersection(*(set(by_domain) for by_domain in scores.values())) if scores else set()
    if not domains:
        return {}
    ranks = [_ranks(_all_finite(column)) for column in _columns(scores, domains)]
    return {name: fmean(rank[place] for rank in ranks) for place, name in enumerate(scores)}


def _ranks(values: Sequence[float]) -> list[float]:
    """Return each value's rank, the highest first; values that tie share the mean of theirs."""
    ordered = sorted(-value for value in values)
    return [(bisect_left(ordered, -value) + bisect_right(ordered, -value) + 1) / 2 for value in values]


def _columns(scores: Mapping[str, Mapping[str, float]], domains: set[str]) -> list[list[float]]:
    return [[by_domain[domain] for by_domain in scores.values()] for domain in sorted(domains)]


def _check(method: str, level: float) -> None:
    if method not in METHODS:
        raise ConfigError(f"An interval is made by {' or '.join(METHODS)}; got {method!r}.")
    if not 0 < level < 1:
        raise ConfigError(f"The level of an interval is a share between 0 and 1, e.g. 0.95; got {level!r}.")


def _finite(values: Sequence[float]) -> list[float]:
    """Return the values in ascending order, so that no result depends on the order of records."""
    if not values:
        raise DataError(
            "An interval needs one value or more; got none. Leave the score out where nothing was measured."
        )
    return sorted(_all_finite(values))


def _all_finite(values: Sequence[float]) -> Sequence[float]:
    if odd := [value for value in values if not math.isfinite(value)]:
        raise DataError(
            f"Scores must be finite to be averaged or ranked; got {odd[0]!r} among {len(values)} values. "
            "Leave such runs out, and show how many are left."
        )
    return values


def _student(values: Sequence[float], mean: float, std: float, level: float) -> tuple[float, float]:
    # Not scipy's t.interval, which is NaN where the standard error is so small that it underflows to 0.
    half = quantile(len(values), level) * std / math.sqrt(len(values))
    return mean - half, mean + half


@cache
def quantile(n: int, level: float = LEVEL) -> float:
    """Return Student's t quantile that an interval of a mean of n values has: its half width in standard errors."""
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls; scipy.stats takes a second to import

    return float(stdtrit(n - 1, (1 + level) / 2))


def _percentile(values: Sequence[float], level: float) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap

    from fednorm.rng import stream

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=stream(0, "statistics", "bootstrap", len(values)),
    ).confidence_interval
    return float(found.low), float(found.high)
