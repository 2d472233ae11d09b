"""How long a continual run will take: its images counted, a few of its own learner's steps timed."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import torch

from fednorm.adaptation._scoring import work as adapting
from fednorm.config import RunConfig
from fednorm.device import seconds
from fednorm.streams.evaluation import accuracy, is_scored, scope_of, split_of
from fednorm.streams.learner import Learner
from fednorm.streams.stream import Stream
from fednorm.streams.task_inference import passes
from fednorm.streams.workbench import ContinualWorkbench
from fednorm.streams.workbench import stream_of as load
from fednorm.training.work import BUDGET, Work, timed

__all__ = ["cost", "estimate_seconds", "load", "measure", "work"]

WARM_UP, TIMED = 2, 4
"""Steps of an experience that are thrown away, and the most that are timed after them."""

SCORED = 64
"""Most images of the evaluation that is timed."""

PROBE_PASSES = 2
"""Passes over the probe images: their activations, and the statistics that the running ones are held against."""


def work(config: RunConfig, stream: Stream) -> Work:
    """Return what a run does: every experience trained on, its end, every evaluation and probe.

    Args:
        config: The run's configuration.
        stream: How many images each experience has.
    """
    joint, train, evaluate = config.learner.card.joint, config.train, config.evaluate
    scope = scope_of(evaluate.experiences, memorization=stream.memorization, joint=joint)
    split = [len(split_of(experience, evaluate.split)) for experience in stream]
    sizes = [len(experience.train) for experience in stream]
    trained = [sum(sizes)] if joint else sizes
    scored, before = sum(split) if scope == "all" else 0, 0  # the untrained network
    for present, size in enumerate(trained, start=len(split) - len(trained)):
        after = before + train.epochs * -(-size // train.batch_size)
        due = [count for number, count in enumerate(split) if is_scored(scope, number, present)]
        scored += (
            _passes(config, present + 1) * sum(due)
            + min(size, evaluate.train_images or size)
            + PROBE_PASSES * evaluate.probe_images
        )
        if evaluate.every_steps:
            points = (after - 1) // evaluate.every_steps - before // evaluate.every_steps + bool(evaluate.every_images)
            scored += (
                _passes(config, present + 1)
                * points
                * sum(
                    min(count, evaluate.every_images or count)
                    for number, count in enumerate(split[: present + 1])
                    if is_scored(scope, number, present)
                )
            )
        before = after
    again = train.epochs * sum(trained) if evaluate.online == "eval" else 0
    adapted = [count for number, count in enumerate(split) if is_scored(scope, number, len(split) - 1)]
    adapts = adapting(evaluate, sum(adapted), sum(len(e.validation) or len(e.train) for e in stream))
    return Work(
        trained=train.epochs * sum(trained) + adapts.trained,
        scored=scored + again + adapts.scored,
        turns=len(trained),
    )


def _passes(config: RunConfig, met: int) -> int:
    """Return how often a test image is scored where each experience that was met may have normalization of its own."""
    if config.train.norms != "per_experience":
        return 1
    return 1 + passes(config.evaluate.infer_task, met)


def cost(bench: ContinualWorkbench) -> Work:
    """Time some steps of a learner whose memory is filled, an experience's end, and an evaluation.

    A few steps of the first experience fill the memory; those of the second are timed. A joint learner has one only.
    With one thread, what other processes do on the machine does not enter.

    Args:
        bench: A workbench of the run, made for this alone: its learner is trained.
    """
    learner, device, end, times = bench.learner, bench.learner.device, 0.0, list[float]()

    def watch(learner: Learner) -> None:
        times.append(seconds(device))
        if len(times) > WARM_UP + TIMED or (len(times) > WARM_UP + 1 and times[-1] - times[0] > BUDGET):
            learner.stop_training()

    learner.watchers.append(watch)
    for source in bench.training[:2]:
        times[:] = [seconds(device)]
        learner.train(source)
        end = seconds(device) - times[-1]
    learner.watchers.remove(watch)
    step = median(after - before for before, after in pairwise(times[min(WARM_UP, len(times) - 2) :]))
    rows, size = torch.arange(min(SCORED, len(source.train))), bench.config.evaluate.batch_size
    with learner.for_evaluation() as model:
        scored = timed(lambda: accuracy(model, source.train, source.classes, batch_size=size, rows=rows), device)
    images = min(learner.train_mb_size, len(source.train))
    return Work(trained=step / images, scored=scored / len(rows), turns=end / learner.memory_filled())


def measure(config: RunConfig, stream: Stream) -> Work:
    """Return what each of a run's work takes, timed on a workbench of its own."""
    return cost(ContinualWorkbench(config, stream))


def estimate_seconds(bench: ContinualWorkbench) -> float:
    """Return about how long a run will take on this machine, in seconds.

    Args:
        bench: A workbench of the run, made for this alone: its learner is trained.
    """
    return work(bench.config, bench.stream).times(cost(bench))
