"""A comparison as files that a reader takes along: CSV with every digit, Markdown and LaTeX as the tables have it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from fednorm.report.comparison import Comparison, Method, comparison_table
from fednorm.report.numbers import DIGITS
from fednorm.report.text import in_csv


def files_of(comparison: Comparison) -> dict[str, str]:
    """Return a comparison as ``csv``, ``md`` and ``tex``."""
    table = comparison_table(comparison)
    return {"csv": csv_of(comparison), "md": table.markdown(), "tex": table.latex()}


def csv_of(comparison: Comparison) -> str:
    """Return a comparison as CSV, a row a method and score: shares in [0, 1], unrounded; empty where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ("method", "score", "n", "mean", "std", "low", "high", "baseline", "difference", "difference_low",
         "difference_high", "paper", "paper_std", "paper_source")
    )  # fmt: skip
    for method in comparison.methods:
        for score in comparison.scores:
            if score.key in method.scores:
                writer.writerow(map(_cell, _row(method, score.key)))
    return buffer.getvalue()


def _row(method: Method, key: str) -> Iterator[object]:
    found, difference, paper = method.scores[key], method.differences.get(key), method.paper.get(key)
    yield from (method.label, key, found.n, found.mean, found.std, found.low, found.high)
    yield from (method.baseline, difference.mean, difference.low, difference.high) if difference else [None] * 4
    yield from (paper.value, paper.std, paper.source) if paper else [None] * 3


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else in_csv(str(value))
