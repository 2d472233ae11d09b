"""One client after the other, in this process: the reference that every other executor is held against.

Clients that are evaluated on one small network are scored in passes over several of them, where that changes no bit
(:mod:`fednorm.federation.together`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

from fednorm.federation import undo
from fednorm.federation.client import carry_out
from fednorm.federation.client_adaptation import ADAPTATION
from fednorm.federation.executors import Answer, Failure, Job
from fednorm.federation.flower_private import metric_record, record_dict
from fednorm.federation.local import Local
from fednorm.federation.scores import Scores, scores_of
from fednorm.federation.together import Together
from fednorm.federation.wire import arrays_of, config_of
from fednorm.federation.workbench import LOCAL_RECORD, Workbench
from fednorm.signals import raise_stop

log = logging.getLogger("fednorm")


class Sequential:
    """Carries each job out when its answer is asked for, so that one client's update is in memory at a time.

    Args:
        bench: The run's workbench.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._together = Together(bench)

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answer to each job; see :class:`~fednorm.federation.executors.Executor`."""
        for (kind, _), group in groupby(jobs, key=lambda job: (job.kind, id(job.content))):
            of_kind = list(group)
            together = self._scored(of_kind) if kind == "evaluate" else [None] * len(of_kind)
            for job, scores in zip(of_kind, together, strict=True):
                if scores is None:
                    yield answer(self._bench, job)
                else:
                    undo.forget(job.context.state)
                    yield record_dict({"metrics": metric_record(scores)})

    def _scored(self, jobs: Sequence[Job]) -> Sequence[Scores | None]:
        """Return the scores of clients on what all of them are sent, None for each that is to be asked by itself."""
        bench, content = self._bench, jobs[0].content
        nobody = [None] * len(jobs)
        plain = bench.strategy.local.before_evaluation is Local.before_evaluation
        # All that is evaluated in a round, and nothing that belongs to one client: its network is the server's.
        if not plain or bench.plan.local or bench.keeping or {"mode", ADAPTATION} & set(config_of(content)):
            return nobody
        if any(LOCAL_RECORD in job.context.state for job in jobs):
            return nobody
        clients = [bench.federation.clients[job.client] for job in jobs]
        try:
            bench.receive(arrays_of(content, "arrays"), jobs[0].context.state)
            bench.trainee.trainable.evaluation_mode()
            scores = scores_of(clients, bench.config.evaluate, self._together.scores, in_a_round=True)
        except Exception as error:
            raise_stop(error)
            log.debug("clients are asked one by one", exc_info=True)
            return nobody
        bench.untouched.note()
        return scores

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
