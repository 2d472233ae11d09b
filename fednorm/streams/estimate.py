"""How long a continual run will take, measured on its own learner before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median

import torch

from fednorm.config import RunConfig
from fednorm.device import seconds
from fednorm.streams.evaluation import accuracy
from fednorm.streams.learner import Learner
from fednorm.streams.stream import Stream
from fednorm.streams.workbench import ContinualWorkbench

WARM_UP, TIMED = 2, 4
"""Steps of an experience that are thrown away, and the most that are timed after them."""

BUDGET = 0.5
"""Seconds after which no further step is timed."""

SCORED = 64
"""Most images of the evaluation that is timed."""

PROBE_PASSES = 2
"""Passes over the probe images: their activations, and the statistics that the running ones are held against."""


@dataclass(frozen=True)
class Rates:
    """What the parts of a run cost, in seconds.

    Attributes:
        step: A training step, its memory samples and augmentation with it.
        end: What the learner does when an experience has ended, e.g. EWC's Fisher information.
        image: An image that is scored or probed.
    """

    step: float
    end: float
    image: float


class _Clock:
    """Times a learner's steps from now on, and ends the experience when it has enough of them.

    Args:
        learner: The learner.
        timed: The most steps that are timed after the warm-up.
    """

    def __init__(self, learner: Learner, timed: int) -> None:
        self.timed = timed
        self.times = [seconds(learner.device)]

    def __call__(self, learner: Learner) -> None:
        """Note when a step has ended."""
        self.times.append(seconds(learner.device))
        timed = len(self.times) - 1 - WARM_UP
        if timed >= self.timed or (timed >= 1 and self.times[-1] - self.times[0] > BUDGET):
            learner.stop_training()

    @property
    def step(self) -> float:
        """The median time of the steps after the warm-up; of the last one where there are no more than that."""
        kept = self.times[min(WARM_UP, len(self.times) - 2) :]
        return median(after - before for before, after in pairwise(kept))


def measure(bench: ContinualWorkbench) -> Rates:
    """Time some steps of a learner whose memory is filled, an experience's end, and an evaluation.

    A few steps of the first experience fill the memory; those of the second are timed. A joint learner has one only.
    With one thread, what other processes do on the machine does not enter.

    Args:
        bench: A workbench of the run, made for this alone: its learner is trained.
    """
    learner, end = bench.learner, 0.0
    for number, experience in enumerate(some := bench.training[:2], start=1):
        learner.watchers[:] = [clock := _Clock(learner, TIMED if number == len(some) else 0)]
        learner.train(experience)
        end = seconds(learner.device) - clock.times[-1]
    if hasattr(learner.options, "memory_epochs"):  # GDumb trains at the end, on a memory that is not yet full here
        end *= getattr(learner.options, "memory_size", 1) / len(getattr(learner, "buffer", "1"))
    source, batch = bench.training[0], bench.config.evaluate.batch_size
    rows = torch.arange(min(len(source.train), batch, SCORED))
    with learner.for_evaluation() as model:
        accuracy(model, source.train, source.classes, batch_size=batch, rows=rows[:2])
        began = seconds(learner.device)
        accuracy(model, source.train, source.classes, batch_size=batch, rows=rows)
        image = (seconds(learner.device) - began) / len(rows)
    return Rates(clock.step, end, image)


def total_seconds(config: RunConfig, stream: Stream, rates: Rates) -> float:
    """Return about how long a run will take, in seconds: its steps, its experiences' ends, its evaluations.

    Args:
        config: The run's configuration.
        stream: How many images each experience has.
        rates: What the parts cost.
    """
    joint, train = config.learner.card.joint, config.train
    sizes = [len(experience.train) for experience in stream]
    trained = [sum(sizes)] if joint else sizes
    steps = sum(train.epochs * -(-size // train.batch_size) for size in trained)
    return steps * rates.step + len(trained) * rates.end + _images(config, stream, trained) * rates.image


def estimate_seconds(bench: ContinualWorkbench) -> float:
    """Return about how long a run will take on this machine, in seconds.

    Args:
        bench: A workbench of the run, made for this alone: its learner is trained.
    """
    return total_seconds(bench.config, bench.stream, measure(bench))


def _images(config: RunConfig, stream: Stream, trained: Sequence[int]) -> int:
    """Return how many images are scored or probed in all, one counted each time."""
    evaluate = config.evaluate
    scored = [len(e.validation if evaluate.split == "validation" else e.test) for e in stream]
    scope = evaluate.experiences
    if scope == "auto":
        scope = "current" if stream.memorization else "all"
    total = sum(scored) if scope == "all" else 0  # the untrained model
    for number, size in enumerate(trained):
        if scope == "all" or len(trained) == 1:
            total += sum(scored)
        else:
            total += sum(scored[: number + 1]) if scope == "seen" else scored[number]
        total += min(size, evaluate.train_images or size) + PROBE_PASSES * evaluate.probe_images
    return total + _images_on_the_way(config, scope, scored, trained)


def _images_on_the_way(config: RunConfig, scope: str, scored: Sequence[int], trained: Sequence[int]) -> int:
    """Return how many images are scored while experiences are trained on, and before their steps."""
    evaluate, train = config.evaluate, config.train
    total = train.epochs * sum(trained) if evaluate.online == "eval" else 0
    if not evaluate.every_steps:
        return total
    each = [min(size, evaluate.every_images or size) for size in scored]
    ends = [0, *accumulate(train.epochs * -(-size // train.batch_size) for size in trained)]
    for number, (begin, end) in enumerate(pairwise(ends)):
        points = (end - 1) // evaluate.every_steps - begin // evaluate.every_steps + bool(evaluate.every_images)
        seen = each if len(trained) == 1 else each[: number + 1]
        total += points * (each[number] if scope == "current" else sum(seen))
    return total
