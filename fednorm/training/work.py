"""What takes a run's time: counted for all of it, and timed once each on a few real steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from fednorm.device import seconds

BUDGET = 0.5
"""Seconds after which nothing more is timed."""


@dataclass(frozen=True)
class Work:
    """How often a run does each of what takes its time; or how many seconds each takes, once.

    Attributes:
        trained: Images that are trained on, counted each time: their share of forward pass, backward pass and update.
        scored: Images that go through the network untrained.
        turns: A client's turns at the model, in which it is copied; or the ends of experiences.
    """

    trained: float = 0.0
    scored: float = 0.0
    turns: float = 0.0

    def times(self, each: Work) -> float:
        """Return the seconds of all of it, of those that each takes."""
        return self.trained * each.trained + self.scored * each.scored + self.turns * each.turns


def timed(act: Callable[[], object], device: torch.device, *, most: int = 4) -> float:
    """Return how many seconds something takes, the median of a few times after a first one, which is slower.

    Args:
        act: Does it.
        device: Where it is done.
        most: How often it is timed; less often where it takes long.
    """
    act()
    times: list[float] = []
    while len(times) < most and sum(times) < BUDGET:
        began = seconds(device)
        act()
        times.append(seconds(device) - began)
    return median(times)
