"""What tables of federated and of continual results share: the table, grouping over seeds, numbers as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

from rich.console import RenderableType

from fednorm.cards import NORMS, spelled
from fednorm.config import IMMATERIAL as IMMATERIAL_KEYS
from fednorm.config import MACHINE, Kind, RunConfig, kind_of_device
from fednorm.config.adaptations import in_words
from fednorm.records.result import result_of
from fednorm.report import numbers
from fednorm.report.terminal import Fitted
from fednorm.report.text import in_cell, in_markdown, one_line

Result = Mapping[str, Any]

IMMATERIAL = frozenset({"seed", *(".".join(path) for path in IMMATERIAL_KEYS)})
"""Keys of the configuration in which two results of one method may differ."""

SHORT: Mapping[str, str] = {"train.learning_rate": "lr", "train.agc": "agc"}
"""How tables call settings that they name often."""

FEW = 3
"""So many settings a label has whole; of more it says what is unlike most."""

_NOTHING = object()

UNKNOWN = numbers.UNKNOWN
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
        caption: The notes in one line, for a terminal that is not asked for all of them; None where they are shown.
        warnings: Those of the notes that stand beside the caption: without them the numbers would mislead.
        first: The columns that matter most, which a narrow terminal has before others.
        texts: Columns of words, not of numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    caption: str | None = None
    warnings: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Write out what a terminal would obey: names, titles and notes are somebody's words."""
        own = object.__setattr__
        own(self, "title", one_line(self.title))
        own(self, "columns", tuple(map(one_line, self.columns)))
        own(self, "rows", tuple(tuple(map(one_line, row)) for row in self.rows))
        for name in ("notes", "warnings", "first", "texts"):
            own(self, name, tuple(map(one_line, getattr(self, name))))
        if self.caption is not None:
            own(self, "caption", one_line(self.caption))

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

    def rich(self, *, whole: bool = True, notes: bool = True) -> RenderableType:
        """Return the table for a terminal, in which no number is broken over two lines.

        Args:
            whole: Whether columns that do not fit come in further parts; where not, they are left out and named.
            notes: Whether all notes are shown; where not, the caption and the warnings are, where there are any.
        """
        return Fitted(self, whole=whole, notes=notes)


def by_method(results: Sequence[Result], name_of: Callable[[Result], str]) -> dict[str, list[Result]]:
    """Group results by everything but the seed; methods that share a name are told apart by what differs.

    Where more than :data:`FEW` settings differ, what most of the methods share is not repeated: a label then says in
    what a method is unlike them.

    Args:
        results: Results of finished runs.
        name_of: How a table calls a result's method.

    Returns:
        The groups by their labels, in the order in which they first appear.
    """
    groups: dict[str, list[Result]] = {}
    own: dict[str, dict[str, Any]] = {}
    for result in results:
        values = settings(result)
        key = repr(sorted(values.items()))
        groups.setdefault(key, []).append(result)
        own.setdefault(key, values)
    names = {key: name_of(group[0]) for key, group in groups.items()}
    alike: dict[str, list[dict[str, Any]]] = {}
    for key, name in names.items():
        alike.setdefault(name, []).append(own[key])
    odd = {name: _telling(others) for name, others in alike.items() if len(others) > 1}
    return {_label(names[key], own[key], odd.get(names[key], {})): group for key, group in groups.items()}


def settings(result: Result) -> dict[str, Any]:
    """Return the configuration that numbers depend on, the seed left out, as dotted keys.

    A key that a record of an older version lacks has its default, as in the configuration's hash.
    """
    config = result["config"]
    keys = {**_defaults(config.get("kind", "federated")), **flat(config)}
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


@cache
def _defaults(kind: Kind) -> Mapping[str, Any]:
    return {**MACHINE, **flat(RunConfig.default_values(kind))}


def varied(several: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the keys in which not all settings are the same."""
    first = several[0]
    return {key for own in several for key in own.keys() | first.keys() if own.get(key) != first.get(key)}


def _telling(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keys in which methods of one name differ, each with the value that goes without saying."""
    keys = varied(several)
    if len(keys) <= FEW:
        return dict.fromkeys(keys, _NOTHING)
    values = {key: [own.get(key) for own in several] for key in keys}
    common = {key: max(each, key=each.count) for key, each in values.items()}
    return {key: usual if 2 * values[key].count(usual) > len(several) else _NOTHING for key, usual in common.items()}


def _label(name: str, own: Mapping[str, Any], odd: Mapping[str, Any]) -> str:
    """Return a method's name, and the settings that tell it from others of the same name."""
    told = [f"{SHORT.get(key, key)} {_shown(value)}" for key, value in own.items() if key in odd and value != odd[key]]
    return f"{name} {', '.join(told)}" if told else name


def _shown(value: Any) -> Any:
    """Return a value as a label has it: of tables their names alone."""
    tables = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    return in_words(value) if tables else value


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


def interval(values: Sequence[float | None], text: Callable[[float], str] = numbers.fixed) -> str:
    """Return the mean, and the sample standard deviation where there are several; n where some were not measured.

    Args:
        values: A value a run.
        text: How a number is written.
    """
    measured = known(values)
    if not measured:
        return UNKNOWN
    told = text(fmean(measured))
    if len(measured) > 1:
        told += f" ± {text(stdev(measured))}"
    return told if len(measured) == len(values) else f"{told} (n = {len(measured)})"


def percent(values: Sequence[float | None]) -> str:
    """Return shares in [0, 1] as per cent, as :func:`interval` does."""
    return interval(values, numbers.percent)


def evenly(count: int, at_most: int) -> list[int]:
    """Return at most so many of the numbers 0 to ``count - 1``, evenly spaced, the first and the last among them."""
    if count <= at_most:
        return list(range(count))
    return [i * (count - 1) // (at_most - 1) for i in range(at_most)]
