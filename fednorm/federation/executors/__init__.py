"""Executors: who carries out what the clients of a run are asked, behind one narrow interface.

:class:`~fednorm.federation.executors.sequential.Sequential` takes the clients one after the other in this process, and
is the reference; :class:`~fednorm.federation.executors.workers.Workers` has processes that take them side by side, to
the same bits. The in-process grid hands jobs to an executor, and puts the answers into Flower's messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Context, RecordDict


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One client's turn: what it is asked, and what it is sent.

    Attributes:
        kind: ``train``, ``evaluate`` or ``query.NAME``; see :mod:`fednorm.federation.client`.
        client: The client's partition id.
        content: What the server sends; clients of a round share one object, and nobody writes to it.
        context: The client's context, whose ``state`` is what it keeps: it is changed when the answer is given out.
    """

    kind: str
    client: int
    content: RecordDict
    context: Context


@dataclass(frozen=True, slots=True)
class Failure:
    """A client that did not answer, and why, on one line."""

    reason: str


Answer = RecordDict | Failure
"""What comes of a job."""


class Executor(Protocol):
    """Carries out jobs.

    The answers of an executor depend on each job alone: not on the others, nor on how many go at a time.
    """

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answer to each job, in the order of the jobs, as soon as it and all before it are there.

        A client whose turn raises is a :class:`Failure`. Whoever stops asking gives the other jobs up: what their
        clients keep is as it was.

        Args:
            jobs: What is asked; each client at most once.

        Raises:
            FedNormError: The executor itself cannot go on.
        """

    def close(self) -> None:
        """Let go of what the executor holds: processes and memory. It is not used again."""
