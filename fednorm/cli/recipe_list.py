"""``fednorm recipes`` without an argument: a list that is there at once, for nothing of a study is resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fednorm.cli.console import out
from fednorm.report._common import UNKNOWN, Table
from fednorm.report.study_progress import duration
from fednorm.study.recipes import outlines


def run_list() -> None:
    """Print the studies that ship, with their runs and the papers whose numbers they hold."""
    out().print(list_of(outlines()).rich())


def cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Return a table's cells: name, title, runs, estimated time, and whose numbers stand beside ours."""
    made = []
    for row in rows:
        searched, seconds = row["selection_runs"], row.get("estimated_seconds")
        made.append(
            (
                row["name"],
                row["title"],
                f"{row['runs']} + {searched}" if searched else str(row["runs"]),
                UNKNOWN if seconds is None else duration(seconds),
                "; ".join(f"{count} of {source}" for source, count in row["paper"].items()) or "none",
            )
        )
    return made


def list_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the studies without what they would cost."""
    notes = (
        "Runs: those reported + those of a search for hyper-parameters. 'fednorm recipes NAME' says what a study does, "
        "'fednorm recipes --cost' how long each would take here, 'fednorm compare NAME' makes its runs.",
    )
    head = ("name", "study", "runs", "paper's numbers beside ours")
    return Table(
        "Studies that ship", head, tuple((*row[:3], row[4]) for row in cells(rows)), notes, texts=(head[1], head[3])
    )
