"""How a search takes hyper-parameters: every combination of lists, random draws, or Optuna's proposals.

    [search]
    method = "random"        # "grid" (without this key), "random" or "optuna"
    budget = 9               # configurations of every method; not of a grid, whose lists say how many
    seed = 0                 # of the draws; not the runs' seed
    train.learning_rate = { low = 0.003, high = 1.0, log = true }
    train.batch_size = [16, 32, 64]
    model.width = { low = 8, high = 64 }          # whole numbers where both ends are

A range ``{low, high}`` is uniform between its ends, or with ``log`` uniform in the logarithm; numbers with a point are
rounded to four digits, whole ones may be either end. Each key draws from a stream of its own (``seed, "search", key``):
all methods try the same values of a key that they share, and a larger budget begins with a smaller one's draws, whose
runs are then read back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fednorm.config import KeyPath
from fednorm.errors import ConfigError
from fednorm.limits import shown
from fednorm.rng import stream
from fednorm.study.grid import MOST_RUNS, Axis, axes

Table = Mapping[str, Any]

METHODS = ("grid", "random", "optuna")
_DIGITS = 4


@dataclass(frozen=True)
class How:
    """How a study searches.

    Attributes:
        method: One of :data:`METHODS`.
        budget: Configurations of every method; 0 for as many as a grid's lists make.
        seed: Of what is drawn.
    """

    method: str = "grid"
    budget: int = 0
    seed: int = 0

    @property
    def sentence(self) -> str:
        """What a table must say about the search; nothing of a grid."""
        named = {"random": "Drawn at random", "optuna": "Proposed by Optuna's TPE"}
        return f" {named[self.method]}, seed {self.seed}." if self.method in named else ""


@dataclass(frozen=True)
class Range:
    """What a key of a search may be, from one number to another.

    Attributes:
        low: The least value.
        high: The largest value.
        log: Whether the logarithm is uniform.
        whole: Whether values are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> int | float:
        """Return the value below which a share of all is, in [0, 1)."""
        top = self.high + 1 if self.whole else self.high
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(top) - math.log(self.low)))
        else:
            value = self.low + share * (top - self.low)
        if self.whole:
            return min(int(value), int(self.high))
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Span(Axis):
    """A key of a search with a range; ``values`` are its ends.

    Attributes:
        range: The range.
    """

    range: Range


def how_of(table: Table, where: str) -> tuple[How, dict[str, Any]]:
    """Return how ``[search]`` says to search, and its keys without that.

    Args:
        table: The table ``[search]``.
        where: What the study is called in an error.

    Raises:
        ConfigError: The method is unknown, or the budget is missing, no whole number, or not for a grid.
    """
    rest = dict(table)
    method, budget = rest.pop("method", "grid"), rest.pop("budget", 0)
    seed = 0 if isinstance(rest.get("seed"), list) else rest.pop("seed", 0)  # a list is of the runs' own
    if method not in METHODS:
        raise ConfigError(f"{where}: search.method is one of {', '.join(METHODS)}; got {shown(method)}.")
    for key, value in (("budget", budget), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{where}: search.{key} is a whole number of 0 or more; got {shown(value)}.")
    if method == "grid" and budget:
        raise ConfigError(
            f"{where} has search.budget, and a grid tries every combination of its lists. Leave it out, or set "
            'search.method = "random" or "optuna".'
        )
    if method != "grid" and not 0 < budget <= MOST_RUNS:
        raise ConfigError(
            f'{where}: search.method = "{method}" needs search.budget, the number of configurations of every method, '
            f"from 1 to {MOST_RUNS:,}; got {budget}."
        )
    return How(method, budget, seed), rest


def spaces_of(how: How, table: Table, where: str) -> list[Axis]:
    """Return the axes of a table of lists and, unless it is a grid's, ranges.

    Raises:
        ConfigError: A key has neither, or a range is wrong.
    """
    lists, ranges = _parted(table, (), how, where)
    if not ranges:
        return axes(lists, "search")
    found = [*axes(lists, "search"), *(Span(path, (r.low, r.high), r) for path, r in ranges.items())]
    return sorted(found, key=lambda axis: axis.path)


def _parted(table: Table, above: KeyPath, how: How, where: str) -> tuple[dict[str, Any], dict[KeyPath, Range]]:
    """Return the lists of nested keys, and the ranges by key."""
    lists: dict[str, Any] = {}
    ranges: dict[KeyPath, Range] = {}
    for key, value in table.items():
        path = (*above, key)
        if isinstance(value, Mapping) and _is_range(value):
            if how.method == "grid":
                raise ConfigError(
                    f"{where}: search.{'.'.join(path)} is a range, of which a grid has no list. Set search.method = "
                    '"random" or "optuna" and search.budget, or give it a list.'
                )
            ranges[path] = _range(value, f"{where}: search.{'.'.join(path)}")
        elif isinstance(value, Mapping):
            inner, more = _parted(value, path, how, where)
            ranges |= more
            if inner or not value:
                lists[key] = inner
        else:
            lists[key] = value
    return lists, ranges


_ENDS = frozenset(("low", "high", "log", "min", "max", "lower", "upper", "start", "stop", "step"))
"""What the ends of a range are called, here or elsewhere; no section has a key of such a name."""


def _is_range(table: Table) -> bool:
    """Return whether a table is meant as a range, rightly or not, and not as a section of keys."""
    return bool(_ENDS & table.keys()) and not any(isinstance(value, Mapping | list) for value in table.values())


def _range(table: Table, where: str) -> Range:
    unknown = sorted(set(table) - {"low", "high", "log"})
    low, high, log = table.get("low"), table.get("high"), table.get("log", False)
    numbers = [value for value in (low, high) if isinstance(value, int | float) and not isinstance(value, bool)]
    if unknown or len(numbers) < 2 or not isinstance(log, bool) or not all(map(math.isfinite, numbers)):
        raise ConfigError(
            f"{where} is a range {{ low = NUMBER, high = NUMBER, log = true or false }}; got {shown(dict(table))}."
        )
    least, most = numbers
    if least >= most or (log and least <= 0):
        rule = "low above 0 and below high" if log else "low below high"
        raise ConfigError(f"{where} needs {rule}; got low = {least}, high = {most}.")
    return Range(least, most, log, all(isinstance(value, int) for value in numbers))


def drawn(how: How, space: Sequence[Axis], where: str) -> Iterator[dict[KeyPath, Any]]:
    """Yield the configurations of a random search, each once.

    Raises:
        ConfigError: There are fewer configurations than the budget asks for.
    """
    if not space:
        yield {}
        return
    require_enough(how, space, where)
    shares = [stream(how.seed, "search", ".".join(axis.path)) for axis in space]
    seen: set[str] = set()
    for _ in itertools.count():
        keys = {axis.path: _value(axis, float(rng.random())) for axis, rng in zip(space, shares, strict=True)}
        if repr(keys) not in seen:
            seen.add(repr(keys))
            yield keys
        if len(seen) == how.budget:
            return


def _value(axis: Axis, share: float) -> Any:
    return axis.range.at(share) if isinstance(axis, Span) else axis.values[int(share * len(axis.values))]


def require_enough(how: How, space: Sequence[Axis], where: str) -> None:
    """Refuse a space that holds fewer configurations than are to be tried.

    Raises:
        ConfigError: It does.
    """
    count = math.prod(_count(axis) for axis in space)
    if count < how.budget:
        raise ConfigError(
            f"{where}: search.budget is {how.budget}, and its lists and ranges make {count:g} configurations. Give "
            "them more values, or lower the budget."
        )


def _count(axis: Axis) -> float:
    if not isinstance(axis, Span):
        return len(axis.values)
    return axis.range.high - axis.range.low + 1 if axis.range.whole else math.inf
