"""Which executor a run has: how many workers, from cores, clients and the work that there is; never from timing."""

from __future__ import annotations

import sys

import numpy as np

from fednorm.config import RunConfig
from fednorm.cores import cores_of_a_run
from fednorm.errors import ConfigError
from fednorm.federation.cohort.engine import engine_of
from fednorm.federation.estimate import images_of_round
from fednorm.federation.executors import Executor
from fednorm.federation.executors.cohort import Cohort
from fednorm.federation.executors.sequential import Sequential
from fednorm.federation.executors.workers import Workers
from fednorm.federation.workbench import Workbench
from fednorm.memory import free_memory

TURN, OPERATION, IMAGE = 3e-3, 1e-10, 2e-5
"""About the seconds of a client's turn, of a multiplication and addition, and of an image beside its operations."""

WORTH = 4.0
"""Seconds of work, so estimated, from which workers are started: to fork them takes a few tenths of one."""

COPIES, BESIDE = 10, 2**28
"""What a worker takes, about: so many copies of the model (its own, gradients, what comes and goes), and more bytes."""


def executor_of(bench: Workbench) -> Executor:
    """Return the executor of a run in this process.

    Raises:
        ConfigError: The configuration asks for workers that cannot be had, or for an engine that cannot carry it out.
    """
    engine, count = engine_of(bench), workers_of(bench)
    if engine.name == "cohort":
        return Cohort(bench, engine.cohort_size)
    return Workers(bench, count) if count > 1 else Sequential(bench)


def workers_of(bench: Workbench) -> int:
    """Return how many workers a run has: as many as it asks for, or what pays.

    Raises:
        ConfigError: It asks for more than there are cores, or for what workers cannot do.
    """
    config, cores = bench.config, cores_of_a_run()
    cohort = "a cohort trains in one process" if engine_of(bench).name == "cohort" else ""
    obstacle = cohort or obstacle_of(config)
    if isinstance(config.workers, str):  # auto
        return 1 if obstacle else max(1, min(cores.share, _wanted(bench), _fitting(bench)))
    if config.workers > 1 and obstacle:
        raise ConfigError(f"workers is {config.workers}, and {obstacle}. Set workers to 1, or leave it out.")
    if config.workers > cores.all:
        raise ConfigError(
            f"workers is {config.workers}, and {cores.all} core{'s'[: cores.all > 1]} can be used here: each worker "
            "keeps one busy. Take at most as many, or leave workers out."
        )
    return min(config.workers, cores.share)


def obstacle_of(config: RunConfig) -> str:
    """Return why a run cannot have workers, as a clause; an empty string where it can."""
    if config.device != "cpu":
        return f"workers compute on the CPU; the device is {config.device}"
    if config.threads > 1:
        return f"each worker has one thread; threads is {config.threads}, on which the last bits depend"
    if config.compile:
        return "workers do not go through torch.compile"
    if sys.platform != "linux":
        return "workers are forked, which is safe on Linux alone"
    return ""


def _wanted(bench: Workbench) -> int:
    """Return how many workers pay: one for each client of a round, and one alone where the whole run is short."""
    config = bench.config
    sampled = max(1, round(config.rounds.fraction * int(bench.federation.counts.trains.sum())))
    if sampled < 2 or estimated_seconds(bench) < WORTH:
        return 1
    return sampled


def _fitting(bench: Workbench) -> int:
    """Return how many workers there is memory for; where there is not enough, no bit depends on it."""
    state: int = sum(tensor.nbytes for tensor in bench.model.state_dict().values())
    return free_memory() // (COPIES * state + BESIDE)


def estimated_seconds(bench: Workbench) -> float:
    """Return roughly how long a run computes, counted and not timed, so that it is the same at every call.

    A weight is used once an image, forward, and twice backward; a convolution's at every place, of which a layer has
    a sixteenth of the image's, say.
    """
    train, counts = bench.config.train, bench.federation.counts
    clients = int(counts.trains.sum())
    share = max(1, round(bench.config.rounds.fraction * clients)) / max(clients, 1)
    sizes = zip(*np.unique(counts.train[counts.trains], return_counts=True), strict=True)
    trained = share * sum(int(number) * images_of_round(train, int(size)) for size, number in sizes)
    scored = int(counts.test[counts.trains].sum()) / bench.evaluate_every
    places = (bench.federation.image_size / 4) ** 2
    weights = (parameter for parameter in bench.model.parameters() if parameter.dim() > 1)
    operations = sum(weight.numel() * (places if weight.dim() == 4 else 1) for weight in weights)
    images = trained * (IMAGE + 3 * operations * OPERATION) + scored * (IMAGE + operations * OPERATION)
    turns = clients * (share + 1 / bench.evaluate_every)
    return bench.num_rounds * (turns * TURN + images)
