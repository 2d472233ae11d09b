"""Which engine a run's clients train on: one client at a time, or cohorts of many small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fednorm.errors import ConfigError
from fednorm.federation.cohort.support import refusal
from fednorm.federation.cohort.training import rows_of
from fednorm.federation.cohort.work import MOST_FLOPS, work_of

if TYPE_CHECKING:
    from fednorm.federation.workbench import Workbench

LEAST_CLIENTS = 2
"""Clients of a round from which there is a cohort."""


@dataclass(frozen=True)
class Engine:
    """What carries out the clients' turns.

    Attributes:
        name: ``client`` or ``cohort``.
        cohort_size: The most clients of a cohort; 0 for ``client``.
        why: Why it is this one, a clause.
    """

    name: str
    cohort_size: int = 0
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as a record has it."""
        size = {"cohort_size": self.cohort_size} if self.cohort_size else {}
        return {"name": self.name, **size, **({"why": self.why} if self.why else {})}


def engine_of(bench: Workbench) -> Engine:
    """Return the engine of a run, decided once for a workbench, before its first turn.

    It follows from the configuration and the data alone: the work of a client's step is counted, never timed.

    Raises:
        ConfigError: ``engine`` is ``cohort``, and the run's clients cannot train as one.
    """
    if bench.engine is None:
        bench.engine = _chosen(bench)
    return bench.engine


def _chosen(bench: Workbench) -> Engine:
    config = bench.config
    if config.engine == "client":
        return Engine("client")
    work = work_of(bench, rows_of(bench))
    size = config.cohort_size or work.clients
    if config.engine == "auto":
        sampled = round(config.rounds.fraction * int(bench.federation.counts.trains.sum()))
        if work.flops > MOST_FLOPS:
            return Engine("client", why=f"{_work(work.flops)}, and a cohort pays up to {MOST_FLOPS / 1e6:.0f}")
        if sampled < LEAST_CLIENTS or size < LEAST_CLIENTS:
            return Engine("client", why="a round has one client, or memory is for one at a time")
        why = refusal(bench)
        return Engine("client", why=why) if why else Engine("cohort", size, _work(work.flops))
    if why := refusal(bench):
        raise ConfigError(
            f"engine is 'cohort', and {why}. Take engine 'client', or 'auto', which takes cohorts where it can."
        )
    return Engine("cohort", size, _work(work.flops))


def _work(flops: float) -> str:
    return f"a client's step has {flops / 1e6:.3g} million floating-point operations"
