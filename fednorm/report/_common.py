"""What tables of federated and of continual results share: the table, grouping over seeds, numbers as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from fednorm.cards import NORMS, spelled
from fednorm.config import IMMATERIAL as IMMATERIAL_KEYS
from fednorm.config import MACHINE, RunConfig, kind_of_device
from fednorm.records.result import result_of
from fednorm.report.text import in_cell, in_markdown, one_line

Result = Mapping[str, Any]

IMMATERIAL = frozenset({"seed", *(".".join(path) for path in IMMATERIAL_KEYS)})
"""Keys of the configuration in which two results of one method may differ."""

SHORT: Mapping[str, str] = {"train.learning_rate": "lr", "train.agc": "agc"}
"""How tables call settings that they name often."""

UNKNOWN = "–"
"""The cell of what was not measured."""


def name_of(result: Result) -> str:
    """Return how tables call a result's method."""
    return result_of(result).method_name


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Column heads; the first column holds names, the others numbers.
        rows: The cells.
        notes: Sentences under it.
        in_parts: Whether a terminal that is too narrow gets its columns in parts, one under the other; where not,
            all columns shrink.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    in_parts: bool = False

    def __post_init__(self) -> None:
        """Write out what a terminal would obey: names, titles and notes are somebody's words."""
        own = object.__setattr__
        own(self, "title", one_line(self.title))
        own(self, "columns", tuple(map(one_line, self.columns)))
        own(self, "rows", tuple(tuple(map(one_line, row)) for row in self.rows))
        own(self, "notes", tuple(map(one_line, self.notes)))

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = [
            "| " + " | ".join(cells) + " |"
            for cells in (map(in_cell, self.columns), rule, *(map(in_cell, row) for row in self.rows))
        ]
        return "\n".join([f"**{in_markdown(self.title)}**", "", *lines, "", *map(in_markdown, self.notes)])

    def latex(self) -> str:
        """Return the table in LaTeX: a float of the package booktabs, title and notes as its caption."""
        from fednorm.report.latex import float_of

        return float_of(self.title, self.columns, self.rows, self.notes)

    def rich(self) -> RenderableType:
        """Return the table for a terminal."""
        if self.in_parts:
            return _Parts(self)
        table = _empty(escape(self.title), escape("\n".join(self.notes)))
        for i, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if i else "left", no_wrap=not i, overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def _empty(title: str | None = None, caption: str | None = None) -> RichTable:
    return RichTable(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,  # without lines and margins, ten columns fit a terminal of 80 characters
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


class _Parts:
    """A table that keeps every number in one line: where all columns do not fit, more parts come under the first."""

    GAP = 2
    """Characters between two columns."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = self.table
        yield Text(table.title, style="table.title")
        names, *widths = map(self._width, range(len(table.columns)))
        if names + sum(width + self.GAP for width in widths) > options.max_width:
            names = min(names, options.max_width // 3)
        for number, columns in enumerate(self._parts(options.max_width - names, widths)):
            if number:
                yield Text()
            part = _empty()
            part.add_column(escape(table.columns[0]), width=names, overflow="fold")
            for column in columns:
                part.add_column(escape(table.columns[column]), width=widths[column - 1], justify="right")
            for row in table.rows:
                part.add_row(escape(row[0]), *(escape(row[column]) for column in columns))
            yield part
        yield from (Text(note, style="table.caption") for note in table.notes)

    def _width(self, column: int) -> int:
        """Return the characters that a column needs: names and numbers stay whole, heads may break between words."""
        words = self.table.columns[column].split()
        return max(map(cell_len, (*words, *(row[column] for row in self.table.rows))))

    def _parts(self, room: int, widths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the columns of each part, one or more of them, as many as there is room for."""
        part: list[int] = []
        left = room
        for column, width in enumerate(widths, start=1):
            if part and width + self.GAP > left:
                yield part
                part, left = [], room
            part.append(column)
            left -= width + self.GAP
        yield part


def by_method(results: Sequence[Result], name_of: Callable[[Result], str]) -> dict[str, list[Result]]:
    """Group results by everything but the seed; methods that share a name are told apart by what differs.

    Args:
        results: Results of finished runs.
        name_of: How a table calls a result's method.

    Returns:
        The groups by their labels, in the order in which they first appear.
    """
    keys: dict[str, list[Result]] = {}
    for result in results:
        keys.setdefault(repr(sorted(settings(result).items())), []).append(result)
    groups = list(keys.values())
    names = [name_of(group[0]) for group in groups]
    alike = [[other[0] for other, called in zip(groups, names, strict=True) if called == name] for name in names]
    labels = [
        f"{name} {_difference(group[0], others)}" if len(others) > 1 else name
        for name, group, others in zip(names, groups, alike, strict=True)
    ]
    return dict(zip(labels, groups, strict=True))


def settings(result: Result) -> dict[str, Any]:
    """Return the configuration that numbers depend on, the seed left out, as dotted keys.

    A key that a record of an older version lacks has its default, as in the configuration's hash.
    """
    config = result["config"]
    defaults = RunConfig.defaults(config.get("kind", "federated"))
    keys = {**MACHINE, **flat(defaults.to_dict()), **flat(config)}
    keys["device"] = kind_of_device(keys["device"])
    return {key: value for key, value in keys.items() if key not in IMMATERIAL}


def flat(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys; ``options`` stand beside their method's name."""
    keys: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            keys |= flat(value, before if key == "options" else f"{before}{key}.")
        else:
            keys[f"{before}{key}"] = value
    return keys


def _difference(result: Result, others: Sequence[Result]) -> str:
    """Return the settings that tell a result from others of the same name."""
    own, rest = settings(result), [settings(other) for other in others]
    odd = [key for key in own if any(own[key] != other.get(key) for other in rest)]
    return ", ".join(f"{SHORT.get(key, key)} {own[key]}" for key in odd)


def seeds(results: Sequence[Result], groups: Mapping[str, Sequence[Result]]) -> str:
    """Return the seeds, and what n and the intervals of a table of these groups are."""
    numbers = sorted({result["config"]["seed"] for result in results})
    fewest, most = min(map(len, groups.values())), max(map(len, groups.values()))
    said = f"n = {most} seeds, mean ± standard deviation" if most > 1 else "one seed, no interval"
    if fewest != most:
        said = f"n = {fewest} to {most} seeds, mean ± standard deviation where n > 1"
    return f"Seed {', '.join(map(str, numbers))} ({said})"


def reconstructions(results: Iterable[Result]) -> list[str]:
    """Return a sentence for each of fednorm's norms among results whose formula is, in part, a reconstruction."""
    names = dict.fromkeys(spelled(str(result["config"]["norm"]["name"])) for result in results)
    marked = {name: NORMS.stated(name, "reconstruction", "") for name in names if name in NORMS.built_in}
    return [f"{name} (reconstruction, unverified): {what.rstrip('.')}." for name, what in marked.items() if what]


def incomplete(groups: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return a note where clients did not answer the evaluation that a result rests on, or no note."""
    told = []
    for name, group in groups.items():
        for result in group:
            if missing := result["final"].get("missing"):
                clients = f"client{'s'[: len(missing['clients']) != 1]} {', '.join(map(str, missing['clients']))}"
                domains = f", nobody of {', '.join(missing['domains'])}" if missing["domains"] else ""
                told.append(f"{name}, seed {result['config']['seed']}: {clients}{domains}")
    return [f"Missing from the last evaluation: {'; '.join(told)}."] if told else []


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that were measured and are finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def interval(values: Sequence[float | None], form: str = ".1f") -> str:
    """Return the mean, and the sample standard deviation where there are several; n where some were not measured."""
    numbers = known(values)
    if not numbers:
        return UNKNOWN
    text = format(mean(numbers), form)
    if len(numbers) > 1:
        text += f" ± {stdev(numbers):{form}}"
    return text if len(numbers) == len(values) else f"{text} (n = {len(numbers)})"


def percent(values: Sequence[float | None]) -> str:
    """Return shares in [0, 1] as per cent, as :func:`interval` does."""
    return interval([None if value is None else 100 * value for value in values])


def evenly(count: int, at_most: int) -> list[int]:
    """Return at most so many of the numbers 0 to ``count - 1``, evenly spaced, the first and the last among them."""
    if count <= at_most:
        return list(range(count))
    return [i * (count - 1) // (at_most - 1) for i in range(at_most)]
