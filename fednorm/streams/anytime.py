"""Accuracy while a learner trains: a point at every so many steps, which no bit of the training depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from torch import nn

from fednorm.streams.metrics import Point

Scores = list[float | None]


class AnytimePoints:
    """The points of the present experience, at every ``every`` steps and at its end.

    Args:
        every: Steps between two points; 0 for none.
        steps: Steps of each experience; the end of one is a point whatever its number.

    Attributes:
        points: Those of the present experience so far, for JSON: ``step`` and ``accuracy``, on each experience up to
            the present one, None where it is not scored.
    """

    def __init__(self, every: int, steps: Sequence[int]) -> None:
        self.every = every
        self._ends = set(accumulate(steps))
        self.points: list[dict[str, Any]] = []

    def take(self, step: int, measure: Callable[[], Scores]) -> None:
        """Add a point after a step where one is due; the one at an experience's end comes with :meth:`close`."""
        if self.every and step % self.every == 0 and step not in self._ends:
            self.points.append({"step": step, "accuracy": measure()})

    def close(self, step: int, measure: Callable[[], Scores]) -> dict[str, Any]:
        """Return what an experience's line has of the points: all of them under ``anytime``, or nothing."""
        if not self.every:
            return {}
        points, self.points = self.points, []
        return {"anytime": [*points, {"step": step, "accuracy": measure()}]}


def points_of(lines: Sequence[Any]) -> list[Point]:
    """Return the points of a run from its experiences' lines, in order; none where it was not measured on the way."""
    return [
        Point(line["experience"], tuple(float("nan") if share is None else share for share in point["accuracy"]))
        for line in lines
        for point in line.get("anytime") or []
    ]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Run a block, then put every module back into training or evaluation mode, as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
