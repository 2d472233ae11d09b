"""How a run went, as curves: numbers by round or by experience, both counted from 1.

What was not measured, or is not finite, has no point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from fednorm.records.result import result_of
from fednorm.report._common import Result, known

Curve = dict[int, float]
"""A number by round or experience."""


def steps(result: Result) -> list[tuple[int, Mapping[str, Any]]]:
    """Return a run's lines, with the number of the round or experience from 1."""
    return result_of(result).steps


def of_key(result: Result, key: str) -> Curve:
    """Return a number that lines have under a key, e.g. ``mean`` or ``train_accuracy``."""
    return _finite({number: line.get(key) for number, line in steps(result)})


def of_domain(result: Result, domain: str) -> Curve:
    """Return a federated run's accuracy on a domain; summaries do not keep it."""
    return _finite({number: (line.get("per_domain") or {}).get(domain) for number, line in steps(result)})


def of_average(result: Result) -> Curve:
    """Return the average accuracy over the experiences seen after each, where all of them were measured."""
    averages: dict[int, float | None] = {}
    for number, _ in steps(result):
        seen = result["accuracy_matrix"][number - 1][:number] if result["accuracy_matrix"] else []
        averages[number] = fmean(seen) if seen and len(known(seen)) == number else None
    return _finite(averages)


def of_forgetting(result: Result) -> Curve:
    """Return the forgetting after each experience but the first: of those before it the best accuracy minus today's.

    The mean over ``j < k`` of ``max_{j <= i <= k} R[i, j] - R[k, j]``; the last point is the score
    ``forgetting_max_minus_last``. No point where an accuracy was not measured.
    """
    matrix = result["accuracy_matrix"]
    curve: dict[int, float | None] = {}
    for number, _ in steps(result):
        rows = [row[: number - 1] for row in matrix[:number]]
        lost = [_lost([row[j] for row in rows[j:]]) for j in range(number - 1)] if len(rows) == number else []
        curve[number] = fmean(known(lost)) if lost and len(known(lost)) == len(lost) else None
    return _finite(curve)


def _lost(accuracies: Sequence[float | None]) -> float | None:
    measured = known(accuracies)
    return max(measured) - measured[-1] if measured and len(measured) == len(accuracies) else None


def named(result: Result, name: str) -> Curve:
    """Return one of a result's own curves (:attr:`~fednorm.records.result.Result.curves`)."""
    return of_average(result) if name == "average" else of_key(result, name)


def of_diagnostic(result: Result, quantity: str) -> Curve:
    """Return a diagnostic as one number a step: drift is the mean over layers and domains.

    Other quantities are the geometric mean over the hidden layers, all but the last, as in
    :func:`fednorm.report.stream_table.plasticity_table`.
    """
    curve: dict[int, float | None] = {}
    for number, line in steps(result):
        found = (line.get("diagnostics") or {}).get(quantity) or {}
        inner = [value for value in found.values() if isinstance(value, Mapping)]
        if quantity == "drift":
            values = known([value for layers in inner or [found] for value in layers.values()])
            curve[number] = fmean(values) if values else None
        else:
            values = known(list(found.values())[:-1])
            curve[number] = geometric_mean(values) if values and min(values) > 0 else None
    return _finite(curve)


def mean_matrix(results: Sequence[Result]) -> list[list[float | None]]:
    """Return the accuracy matrix as the mean over runs; None where any of them did not measure an accuracy."""
    matrices = [result_of(result).matrix for result in results]
    return [
        [fmean(cells) if len(known(cells)) == len(cells) else None for cells in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def _finite(curve: Mapping[int, Any]) -> Curve:
    return {number: float(value) for number, value in curve.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
