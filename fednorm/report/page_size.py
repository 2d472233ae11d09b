"""How a page's document stays below a size: fewer digits, then fewer points of curves; it says so."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fednorm.report._common import evenly
from fednorm.report.numbers import DIGITS

Document = dict[str, Any]

BUDGET = 4_600_000
"""Characters of the document at most: with Plotly (4.8 MB) and the page's own parts it stays below 10 MB."""

THINNINGS = ((400, 60), (200, 40), (150, 28), (100, 20), (80, 14), (60, 10), (40, 7), (20, 4), (8, 2))
"""Points that a learning curve and a diagnostic of one layer have at most, tried in turn until the document fits."""

COARSE = 4
"""Significant digits of curves and diagnostics on a page that would otherwise be too large."""


def number(value: Any, digits: int = DIGITS) -> float | int | None:
    """Return a measured value with so many significant digits; None for what is unknown or not finite.

    Integers stay whole.
    """
    if value is None or isinstance(value, int):
        return value
    rounded = float(f"{value:.{digits}g}")
    return rounded if math.isfinite(rounded) else None


def fitting(full: Document) -> Document:
    """Return a document that fits the budget: as it is, with fewer digits, or with fewer points of each curve."""
    if _size(full) <= BUDGET:
        return full
    made = _thinned(full, None, None)
    if (size := _size(made)) <= BUDGET:
        return made
    lines, layers = (sum(_size(run[part]) for run in _runs(made)) for part in ("series", "layers"))
    longest = [max((len(grid) for grid in full[part]), default=1) for part in ("grids", "times")]
    for curve, diagnostic in THINNINGS:
        shares = min(1.0, curve / longest[0]), min(1.0, diagnostic / longest[1])
        if shares != (1.0, 1.0) and size - (1 - shares[0]) * lines - (1 - shares[1]) * layers <= BUDGET:
            made = _thinned(full, curve, diagnostic)
            if _size(made) <= BUDGET:
                break
    return made


def _size(document: Any) -> int:
    return len(json.dumps(document, separators=(",", ":")))


def _runs(document: Document) -> list[Document]:
    return [run for section in document["sections"] for run in section["runs"]]


def _thinned(full: Document, curve: int | None, diagnostic: int | None) -> Document:
    """Return a document with at most so many points a curve and a diagnostic, of few digits; it says so."""

    def thin(run: Document) -> Document:
        series = {key: [grid, _coarse(values, curve)] for key, (grid, values) in run["series"].items()}
        layers = {key: {**of, "values": _deeply(of["values"], diagnostic)} for key, of in run["layers"].items()}
        return {**run, "series": series, "layers": layers}

    said = [full["thinned"]] if full["thinned"] else []
    if curve is not None:
        said.append(
            f"So that the page stays small, a curve has at most {curve} points and a layer's diagnostic "
            f"at most {diagnostic}, evenly spaced, the first and last among them; tables and exports have every number."
        )
    return {
        **full,
        "sections": [{**section, "runs": [thin(run) for run in section["runs"]]} for section in full["sections"]],
        "grids": [_evenly(grid, curve) for grid in full["grids"]],
        "times": [_evenly(grid, diagnostic) for grid in full["times"]],
        "thinned": " ".join(said) or None,
    }


def _evenly(values: Sequence[Any], at_most: int | None) -> Sequence[Any]:
    if at_most is None or len(values) <= at_most:
        return values
    return [values[i] for i in evenly(len(values), at_most)]


def _coarse(values: Sequence[Any], at_most: int | None) -> list[Any]:
    return [float(f"{value:.{COARSE}g}") if isinstance(value, float) else value for value in _evenly(values, at_most)]


def _deeply(values: list[Any], at_most: int | None) -> list[Any]:
    """Return nested lists with the innermost ones thinned."""
    return [_deeply(inner, at_most) for inner in values] if isinstance(values[0], list) else _coarse(values, at_most)
