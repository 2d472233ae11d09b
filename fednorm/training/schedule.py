"""The learning rate as a function of the step: nothing is remembered, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning rate for every step.

        warm-up      rate * (t + 1) / warmup                                  for t < warmup
        constant     rate
        linear       rate * (1 - (1 - final) * p)                             p = (t - warmup) / (total - warmup)
        cosine       rate * (final + (1 - final) * (1 + cos(pi p)) / 2)
        step         rate * decay^floor((t - warmup) / every)
        exponential  rate * decay^(t - warmup)

    t counts the optimizer's steps on a stream, and the rounds of a federation.

    NaP needs an explicit schedule where the growth of the weights had made an implicit one (arXiv 2407.01800).

    Attributes:
        rate: The learning rate before the schedule.
        kind: ``constant``, ``linear``, ``cosine``, ``step`` or ``exponential``.
        over: ``stream`` or ``experience``: what t and the total count.
        warmup: Steps of the warm-up.
        final: The last rate, as a share of the first.
        total: Steps of the whole stream, or rounds of the federation.
        decay: Factor of ``step`` and ``exponential``.
        every: Steps, or rounds, between two falls of ``step``.
    """

    rate: float
    kind: str = "constant"
    over: str = "stream"
    warmup: int = 0
    final: float = 0.0
    total: int = 1
    decay: float = 1.0
    every: int = 1

    def at(self, step: int, step_of_experience: int, steps_of_experience: int) -> float:
        """Return the rate of a step, all numbered from 0."""
        of_stream = self.over == "stream"
        t, total = (step, self.total) if of_stream else (step_of_experience, steps_of_experience)
        t = max(t, 0)
        if t < self.warmup:
            return self.rate * (t + 1) / self.warmup
        if self.kind == "constant":
            return self.rate
        if self.kind in ("step", "exponential"):
            falls = (t - self.warmup) // self.every if self.kind == "step" else t - self.warmup
            return float(self.rate * self.decay**falls)
        p = min(1.0, (t - self.warmup) / max(1, total - self.warmup))
        fall = 1 - p if self.kind == "linear" else (1 + math.cos(math.pi * p)) / 2
        return self.rate * (self.final + (1 - self.final) * fall)
