"""Which methods of a comparison are a baseline, and which of them each of the others is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fednorm.report._common import Result, name_of, varied
from fednorm.report.grouping import data_settings, matches


def baselines_of(
    groups: Mapping[str, Sequence[Result]], studies: Sequence[Mapping[str, Any]], baseline: str | None
) -> list[str]:
    """Return the labels of the methods that are a baseline: as asked for, else as the first study that has one says."""
    if baseline is not None:
        named = [label for label, group in groups.items() if name_of(group[0]) == baseline]
        return [baseline] if baseline in groups else named
    subset = next((study["baseline"] for study in studies if study.get("baseline")), None)
    return [label for label, group in groups.items() if matches(group[0], subset)] if subset else []


class Nearest:
    """Which baseline a method is compared with: on the same data, the one that differs in fewest settings.

    Only the settings in which baselines differ among themselves tell. Of a grid there is one that differs in none of
    them, which is looked up; the others are gone through where there is none.

    Args:
        baselines: The labels of the methods that are a baseline.
        own: Every method's settings, by its label.
    """

    def __init__(self, baselines: Sequence[str], own: Mapping[str, Mapping[str, Any]]) -> None:
        self.own = own
        self.baselines = frozenset(baselines)
        self.told: list[str] = sorted(varied([own[label] for label in baselines])) if baselines else []
        self.places: dict[str, dict[str, str]] = {}
        for label in baselines:
            self.places.setdefault(data_settings(own[label]), {})[self._place(label)] = label

    def to(self, label: str) -> str | None:
        """Return the baseline of a method.

        None for a baseline itself, and where no baseline or more than one is nearest: nothing is guessed.
        """
        if label in self.baselines:
            return None
        places = self.places.get(data_settings(self.own[label]), {})
        if (same := places.get(self._place(label))) is not None:
            return same
        mine = self.own[label]
        apart = {
            other: sum(mine.get(key) != self.own[other].get(key) for key in self.told) for other in places.values()
        }
        nearest = [other for other, count in apart.items() if count == min(apart.values())]
        return nearest[0] if len(nearest) == 1 else None

    def _place(self, label: str) -> str:
        return repr([self.own[label].get(key) for key in self.told])
