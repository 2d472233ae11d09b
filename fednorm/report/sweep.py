"""Methods that are one method with several settings: what they share, so that they look alike, and what was swept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fednorm.cards import spelled
from fednorm.report._common import SHORT, name_of, settings, varied
from fednorm.report.comparison import Comparison, Method


@dataclass(frozen=True)
class Sweep:
    """A setting that has several values among rows of one method.

    Attributes:
        key: The setting's dotted key.
        label: What a chart calls it.
        values: Its value in each method of the comparison, in their order; None where it is no number.
    """

    key: str
    label: str
    values: tuple[float | None, ...]


def kin(comparison: Comparison) -> list[tuple[int, int]]:
    """Return for each method the number of its strategy (or learner) and norm, and its own number among those.

    A strategy keeps one colour whatever is swept; the second number, in order of what is swept, is its tone and marker.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, method in enumerate(comparison.methods):
        groups.setdefault(_names(method), []).append(place)
    first = next(iter(sweeps(comparison)), None)
    found: dict[int, tuple[int, int]] = {}
    for group, places in enumerate(groups.values()):
        swept = [((first.values[place] if first else None) or 0.0, place) for place in places]
        found |= {place: (group, tone) for tone, (_, place) in enumerate(sorted(swept))}
    return [found[place] for place in range(len(comparison.methods))]


def group_names(comparison: Comparison) -> list[str]:
    """Return what the groups of :func:`kin` are called: a method's name without its options."""
    first: dict[tuple[str, ...], str] = {}
    for method in comparison.methods:
        first.setdefault(_names(method), name_of(method.results[0]).partition(" (")[0])
    return list(first.values())


def sweeps(comparison: Comparison) -> list[Sweep]:
    """Return the numeric settings of which a method has several values, the one that tells most rows apart first."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    own = [settings(method.results[0]) for method in comparison.methods]
    for method, values in zip(comparison.methods, own, strict=True):
        groups.setdefault(_names(method), []).append(values)
    keys = {key for several in groups.values() for key in varied(several)}
    shown = [key for key in keys if any(_distinct(key, several) > 1 for several in groups.values())]
    told = {key: sum(_distinct(key, several) for several in groups.values()) for key in shown}
    return [
        Sweep(key, SHORT.get(key, key), tuple(_number(values.get(key)) for values in own))
        for key in sorted(shown, key=lambda key: (-told[key], key))
    ]


def _names(method: Method) -> tuple[str, ...]:
    config = method.results[0]["config"]
    return tuple(spelled(str(config[part]["name"])) for part in ("strategy", "learner", "norm") if part in config)


def _distinct(key: str, several: Sequence[Mapping[str, Any]]) -> int:
    return len({number for values in several if (number := _number(values.get(key))) is not None})


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
