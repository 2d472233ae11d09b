"""One client after the other, in this process: the reference that every other executor is held against."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from fednorm.federation.client import carry_out
from fednorm.federation.executors import Answer, Failure, Job
from fednorm.federation.workbench import Workbench
from fednorm.signals import raise_stop

log = logging.getLogger("fednorm")


class Sequential:
    """Carries each job out when its answer is asked for, so that one client's update is in memory at a time.

    Args:
        bench: The run's workbench.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answer to each job; see :class:`~fednorm.federation.executors.Executor`."""
        for job in jobs:
            yield answer(self._bench, job)

    def close(self) -> None:
        """Do nothing: the workbench is whoever's it was."""


def answer(bench: Workbench, job: Job) -> Answer:
    """Carry out one job at a workbench."""
    try:
        return carry_out(bench, job.kind, job.content, job.context)
    except Exception as error:  # a failing client must not end the round, as on Flower's runtimes
        raise_stop(error)
        log.debug("client %d failed", job.client, exc_info=True)
        return Failure(f"{type(error).__name__}: {error}")
