"""What a comparison says, in one sentence: the same words on the terminal, on the page and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from fednorm.report._common import settings
from fednorm.report.comparison import Comparison, Method, by_seed
from fednorm.report.grouping import data_settings
from fednorm.report.numbers import ends, percent, signed
from fednorm.study.statistics import Difference, Interval, paired_difference


def verdict(comparison: Comparison) -> str:
    """Return a comparison's answer, e.g. ``fedbn +9.9 [1.8, 18.0] over fedavg, 3 of 3 seeds; 10.0 below the paper``.

    It is of the best method by the headline score, and its difference to the baseline that it is compared with; where
    methods have different data, of the one with the largest difference. Without a baseline it is of the best mean. An
    interval that holds 0, and a single seed, are said to show nothing.

    Args:
        comparison: The comparison.

    Returns:
        One sentence without a full stop; numbers are per cent, differences percentage points.
    """
    key = comparison.headline
    score = comparison.score(key)
    measured = [method for method in comparison.methods if key in method.scores]
    if score is None or not measured:
        return f"No finished run has a finite {score.label if score else key}"
    better = score.better or 1
    against = [method for method in measured if method.baseline and key in method.differences]
    if against:
        best = max(against, key=lambda method: better * _worth(method, key, against))
        said = _over(best.label, best.differences[key], str(best.baseline))
    else:
        best = max(measured, key=lambda method: better * method.scores[key].mean)
        said = _alone(best, score.label, best.scores[key], len(measured), better)
    paper = best.paper.get(key)
    if paper is not None and paper.deviation is not None:
        departs = f", from whose protocol it departs ({', '.join(paper.departs)})" if paper.departs else ""
        said = f"{said}; {_beside(paper.deviation)}{departs}"
    return said if comparison.reduced is None else f"{said}; reduced to {comparison.reduced:g} of the study"


def distinct_best(comparison: Comparison, key: str) -> Method | None:
    """Return the method with the best mean of a score, if its seeds tell it from every other method's.

    Args:
        comparison: The comparison.
        key: The score's key.

    Returns:
        The method; None where a paired interval between it and another holds 0 or cannot be made, where methods have
        different data, or where neither direction is better.
    """
    score = comparison.score(key)
    measured = [method for method in comparison.methods if key in method.scores]
    if score is None or not score.better or len(measured) < 2:
        return None
    if len({data_settings(settings(method.results[0])) for method in measured}) > 1:
        return None
    best = max(measured, key=lambda method: score.better * method.scores[key].mean)
    own = by_seed(best.results, key)
    made = best.scores[key].method
    for other in measured:
        if other is not best:
            found = paired_difference(own, by_seed(other.results, key), method=made, better=score.better)
            if found is None or found.shows_nothing:
                return None
    return best


def _worth(method: Method, key: str, among: Sequence[Method]) -> float:
    """Return what a method is chosen by: its mean where all have the same data, else its difference."""
    data = {data_settings(settings(other.results[0])) for other in among}
    return method.scores[key].mean if len(data) == 1 else method.differences[key].mean


def _over(label: str, found: Difference, baseline: str) -> str:
    side = "over" if found.mean >= 0 else "under"
    if found.low is None or found.high is None:
        return f"{label} {signed(found.mean)} {side} {baseline}, one seed: no interval"
    said = f"{label} {signed(found.mean)} {ends(found.low, found.high)} {side} {baseline}"
    said += f", {found.better} of {found.n} seeds"
    return f"{said} better: the interval holds 0" if found.shows_nothing else said


def _alone(best: Method, label: str, found: Interval, count: int, better: int) -> str:
    seeds = "one seed: no interval" if found.n == 1 else f"n = {found.n} seeds"
    spread = "" if found.low is None else f" {ends(found.low, found.high)}"
    which = "highest" if better > 0 else "lowest"
    among = f", {which} {label} of {count} methods" if count > 1 else f" {label}"
    return f"{best.label}: {percent(found.mean)}{spread}{among}, {seeds}"


def _beside(deviation: float) -> str:
    size = percent(abs(deviation))
    return "as in the paper" if size == "0.0" else f"{size} {'above' if deviation > 0 else 'below'} the paper"
