"""The table of what became of faults on real nodes: made of what the tests marked ``deployment`` have taken down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from _make.blocks import DOCS, filled
from _make.methods import cell

PAGE = DOCS / "how-to/deploy.md"
RECORD = DOCS / "how-to/deploy-faults.json"


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the page and what it says with its block made anew."""
    yield PAGE, filled(PAGE.read_text(encoding="utf-8"), {"deployment-faults": faults()})


def faults() -> str:
    """Return the table: what was done, and what the run's record says of it."""
    rows = ["| what was done | what the record says |", "| --- | --- |"]
    for row in json.loads(RECORD.read_text(encoding="utf-8")):
        rows.append(f"| {cell(row['done'])} | {'<br>'.join(cell(seen) for seen in row['seen'])} |")
    return "\n".join(rows)
