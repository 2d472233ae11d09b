"""How long a federation on streams will take: its images counted, a client's own learner timed."""

from __future__ import annotations

from statistics import median

from fednorm.config import RunConfig
from fednorm.device import seconds
from fednorm.federated_continual.cells import make_grid
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.client import score
from fednorm.federation.estimate import COPIES, SCORED, first
from fednorm.streams.evaluation import split_of
from fednorm.streams.stream import Stream
from fednorm.streams.task_inference import passes
from fednorm.streams.workbench import stream_of as load
from fednorm.training.work import Work, timed

__all__ = ["cost", "estimate_seconds", "load", "measure", "work"]

TIMED = 3
"""Experiences of a client that are timed at most; its memory fills in the first."""


def work(config: RunConfig, stream: Stream) -> Work:
    """Return what a run does: every cell trained on as often as there are passes, every boundary scored twice.

    What the strategy adds counts from the second experience on, and what its server does between two as training.

    Args:
        config: The run's configuration.
        stream: How many images each experience has.
    """
    grid = make_grid(stream, config.grid, config.data.split_seed or config.seed)
    rounds, share = config.rounds.per_experience, config.rounds.fraction
    trainings = int(config.train.local_epochs) * rounds
    cells = [cell for client in range(len(grid.cells)) for _, cell in grid.row(client)]
    adds = config.strategy.card.make.local.passes(config.strategy.values)
    later = [cell for client in range(len(grid.cells)) for time, cell in grid.row(client) if time]
    held, again = (sum(len(cell.train) for cell in some) for some in (cells, later))
    tests = [len(split_of(experience, config.evaluate.split)) for experience in stream]
    scored = sum(
        sum(tests[number] for number in met) * passes(config.evaluate.infer_task, len(met))
        for client in range(len(grid.cells))
        for time in range(grid.num_times)
        if (met := grid.scored(client, time))
    )
    return Work(
        trained=share * trainings * (held + adds.in_round * again) + adds.between * (grid.num_times - 1),
        scored=2 * scored + len(grid.cells) * sum(tests),
        turns=COPIES * share * rounds * len(cells) + len(grid.cells) * (grid.num_times + 1),
    )


def cost(bench: GridWorkbench) -> Work:
    """Time a client's passes over its first experiences, an evaluation and a copy of the model.

    Args:
        bench: A workbench of the run, whose model is trained.
    """
    device, times = bench.trainee.device, list[float]()
    client = max(range(len(bench.grid.cells)), key=lambda client: len(list(bench.grid.row(client))))
    learner, before = bench.learner(client), bench.read(bench.model.state_dict())
    for _, cell in list(bench.grid.row(client))[:TIMED]:
        began = seconds(device)
        learner.train_passes(cell, 1)
        passed = seconds(device)
        learner.end(cell)
        at_end = (seconds(device) - passed) / learner.train_epochs if learner.trains_at_end else 0.0
        times.append((passed - began + at_end) / len(cell.train))
    scored = first(cell.train, SCORED)
    evaluated = timed(lambda: score(bench, scored), device)
    return Work(median(times[1:] or times), evaluated / len(scored), timed(lambda: bench.write(before), device))


def measure(config: RunConfig, stream: Stream) -> Work:
    """Return what each of a run's work takes, timed on a workbench of its own."""
    return cost(GridWorkbench(config, stream))


def estimate_seconds(bench: GridWorkbench) -> float:
    """Return about how long a run will take on this machine, in seconds.

    Args:
        bench: A workbench of the run, made for this alone: its model is trained.
    """
    return work(bench.config, bench.grid.stream).times(cost(bench))
