"""What an analysis is: a question, rows of networks, and columns of what is measured on them, a value a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from fednorm.errors import ConfigError
from fednorm.limits import shown
from fednorm.report.table import Table

Values = Mapping[str, float]
"""What was measured on one network, by column."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """On what an analysis is made.

    Attributes:
        data: The benchmark (``fednorm list data``); its domains are trained on together.
        data_dir: The folder of the real data, where the benchmark needs one.
        seeds: Seeds; each has its own weights, batches and division of the data.
        steps: Updates of each training; 0 for the analysis's own number.

    Raises:
        ConfigError: There is no seed, one is there twice or negative, or the steps are less than 0.
    """

    data: str = "digits_mini"
    data_dir: str = ""
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds are one or more different numbers from 0; got {shown(list(self.seeds))}.")
        if self.steps < 0:
            raise ConfigError(f"steps must be at least 1, or 0 for the analysis's own number; got {self.steps}.")


@dataclass(frozen=True)
class Column:
    """Something that is measured.

    Attributes:
        key: Its name among a row's values.
        title: Its head in the table.
        form: How a number is written, e.g. ``.1f``.
        scale: What a number is multiplied by for the table, e.g. 100 for percent.
    """

    key: str
    title: str
    form: str = ".2f"
    scale: float = 1.0

    def cell(self, values: Sequence[float | None]) -> str:
        """Return the mean over seeds, and the standard deviation where there are two or more."""
        numbers = [self.scale * value for value in values if value is not None]
        if not numbers:
            return "–"
        mean = f"{fmean(numbers):{self.form}}"
        return mean if len(numbers) < 2 else f"{mean} ± {stdev(numbers):{self.form}}"


@dataclass(frozen=True)
class Row:
    """A network of an analysis.

    Attributes:
        name: What it is called.
        measure: Trains it for a seed, and measures.
    """

    name: str
    measure: Callable[[int], Values]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A question and how it is answered.

    Attributes:
        name: Its name, that of its file.
        title: Of the table.
        about: The question, in a sentence.
        papers: arXiv numbers of what is checked.
        columns: What is measured.
        notes: What a reader of the table must know.
        steps: Updates of each training, unless the setup has its own number.
        unit: What steps are called in the table, where they are not updates.
        rows: Makes the rows of a setup with a number of steps.
    """

    name: str
    title: str
    about: str
    papers: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    steps: int
    rows: Callable[[Setup, int], Iterator[Row]] = field(repr=False)
    unit: str = "steps"

    def run(self, setup: Setup, on_line: Callable[[str], None]) -> dict[str, Any]:
        """Return the analysis's document; see :func:`fednorm.analyses.analyse`."""
        from fednorm.analyses.trial import about_data  # data are read only now

        steps = setup.steps or self.steps
        title, notes = about_data(setup)
        rows = []
        for row in self.rows(setup, steps):
            measured = [row.measure(seed) for seed in setup.seeds]
            values = {column.key: [_finite(one.get(column.key)) for one in measured] for column in self.columns}
            rows.append({"name": row.name, "values": values})
            on_line(f"{row.name}: " + ", ".join(f"{c.title} {c.cell(values[c.key])}" for c in self.columns))
        return {
            "analysis": self.name,
            "data": title,
            "notes": list(notes),
            "seeds": list(setup.seeds),
            "steps": steps,
            "rows": rows,
        }

    def table(self, document: Mapping[str, Any]) -> Table:
        """Return the table of a document of this analysis: a row a network, means over seeds."""
        rows = tuple(
            (row["name"], *(column.cell(row["values"][column.key]) for column in self.columns))
            for row in document["rows"]
        )
        columns = (self.name.replace("_", " "), *(column.title for column in self.columns))
        notes = (*self.notes, _seeds(document, self.unit), *document["notes"])
        return Table(f"{self.title}: {document['data']}", columns, rows, notes)


def _finite(value: float | None) -> float | None:
    """Return None for what has no place in JSON: the values of a network that has diverged."""
    return value if value is not None and math.isfinite(value) else None


def _seeds(document: Mapping[str, Any], unit: str) -> str:
    seeds, steps = document["seeds"], f"{document['steps']:,} {unit}"
    if len(seeds) < 2:
        return f"{steps}, seed {seeds[0]}: one seed, so no deviation."
    return f"{steps}, seeds {', '.join(map(str, seeds))} (n = {len(seeds)}): mean ± standard deviation with n − 1."
