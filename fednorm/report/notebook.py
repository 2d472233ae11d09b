"""What a notebook shows of a result: the table that the command line would print, and the run's curve."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from fednorm.records.result import Result
from fednorm.report._common import Table
from fednorm.report.curves import named
from fednorm.report.grid_table import grid_table
from fednorm.report.plotting import finish, styled
from fednorm.report.stream_table import stream_table
from fednorm.report.table import accuracy_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES: Mapping[str, Callable[[Sequence[Result]], Table]] = {
    "federated": accuracy_table,
    "continual": stream_table,
    "federated_continual": grid_table,
}
"""The table that the command line prints, by kind of run."""


def figure(result: Result) -> Figure:
    """Return how a run went: the mean accuracy by round, or the average accuracy by experience.

    Args:
        result: The result of a finished run.
    """
    from matplotlib.figure import Figure

    with styled():
        drawing = Figure(figsize=(5.0, 3.0), layout="constrained")
        axes = drawing.subplots()
        label, name = list(result.curves.items())[-1]
        curve = named(result, name)
        numbers = list(curve)
        axes.plot(numbers, [100 * curve[number] for number in numbers], marker="o", markersize=3)
        axes.set_title(result.method_name)
        axes.set_xlabel(result.unit)
        axes.set_ylabel(f"{label} (%)")
        finish(axes, share=True)
    return drawing


def html(result: Result) -> str:
    """Return a result's table and curve as HTML that needs no connection.

    Args:
        result: The result of a finished run.
    """
    table = TABLES[result.kind]([result])
    return f"{_table(table)}<img alt='{escape(result.method_name)}' src='data:image/png;base64,{_picture(result)}'>"


def _picture(result: Result) -> str:
    content = io.BytesIO()
    figure(result).savefig(content, format="png", dpi=110)
    return base64.b64encode(content.getvalue()).decode("ascii")


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in table.notes)
    return f"<table><caption>{escape(table.title)}</caption><tr>{heads}</tr>{rows}</table>{notes}"
