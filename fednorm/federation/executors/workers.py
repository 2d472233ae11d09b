"""Several processes of one thread each, which take the clients side by side, to the bits of one after the other.

What a client computes depends on what it is sent and what it keeps alone, and both reach a worker whole; the answers
are given out in the order of the jobs. So 1, 2 and 4 workers give the same bits.

The processes are forked once, at the first round, from a process whose workbench is ready: data are shared until
somebody writes to them, and nobody does. Among the next jobs the longest goes first, so that no worker is left with a
long one at the end.
"""

from __future__ import annotations

import heapq
import logging
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait

from fednorm.errors import FedNormError
from fednorm.federation.executors import Answer, Failure, Job
from fednorm.federation.executors.process import SLOTS, Broadcast, Done, Process, forks_train
from fednorm.federation.executors.sequential import Sequential, answer
from fednorm.federation.wire import nbytes
from fednorm.federation.workbench import Workbench
from fednorm.signals import held

HERE = frozenset({"query.describe", "query.local", "query.statistics", "query.undo"})
"""What is not worth a worker: nothing is computed."""

TRIES = 2
"""How often a client's turn is begun whose worker dies."""

HELD = 2**28
"""Bytes of replies that may wait for one that comes before them."""

log = logging.getLogger("fednorm")


class Workers:
    """Carries jobs out in processes.

    Args:
        bench: The run's workbench; the workers' are copies of it.
        count: How many processes.
        carry: How a worker carries out a job; at its copy of the workbench, by default.
    """

    def __init__(self, bench: Workbench, count: int, carry: Callable[[Job], Answer] | None = None) -> None:
        self._bench, self._count = bench, count
        self._here = Sequential(bench)
        self._carry = carry or partial(_lent, bench)
        self._broadcast = Broadcast()
        self._processes: list[Process] = []
        self._forks_train: bool | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answer to each job; see :class:`~fednorm.federation.executors.Executor`.

        Raises:
            FedNormError: No process can be started.
        """
        several = len(jobs) > 1 and jobs[0].kind not in HERE and len({job.client for job in jobs}) == len(jobs)
        if not several or not self._can():
            yield from self._here.run(jobs)
            return
        turns = _Turns(jobs, self._lengths(jobs), self._window(jobs))
        shared = all(job.content is jobs[0].content for job in jobs)
        if shared:
            self._broadcast.write(jobs[0].content)
        try:
            while turns.left:
                self._give(turns, shared=shared)
                if not turns.ready:
                    self._listen(turns, None)
                    continue
                job, done = turns.next()
                _keep(job, done)
                yield done.answer
                self._listen(turns, 0)
        except GeneratorExit:  # nobody wants the other answers
            self._end([process for process in self._processes if process.jobs])
            raise
        except BaseException:
            self.close()
            raise

    def _can(self) -> bool:
        """Return whether processes can do the work; where not, it is said once and done here, to the same bits."""
        if self._forks_train is None:
            with held():
                self._forks_train = forks_train()
            if not self._forks_train:
                log.warning(
                    "PyTorch has started threads for a device in this process, and computes no gradients in those that "
                    "are forked off it: clients take their turns in this one. The numbers are the same."
                )
        return self._forks_train

    def close(self) -> None:
        """End the processes, in whatever they are."""
        self._end(list(self._processes))
        self._broadcast.arena.close()

    def _give(self, turns: _Turns, *, shared: bool) -> None:
        """Give jobs out as long as there are processes that may have one."""
        while turns.waiting:
            if len(self._processes) < self._count and all(process.jobs for process in self._processes):
                self._start()
            # A second job waits in a worker only where there are others for those that come to an end first.
            most = SLOTS if turns.waiting > self._count else 1
            process = min(self._processes, key=lambda process: len(process.jobs))
            if len(process.jobs) >= most:
                return
            number = turns.pop()
            process.give(number, turns.jobs[number], shared=shared)

    def _start(self) -> None:
        """Start one more process; where the system starts none, those that there are go on.

        Raises:
            FedNormError: There are none.
        """
        with held():  # what Python runs at a fork (for logging's locks) swallows exceptions, and a signal's with them
            self._fork()

    def _fork(self) -> None:
        others = [process.connection for process in self._processes]
        try:
            self._processes.append(Process(self._carry, self._broadcast, self._bench.config.threads, others))
        except OSError as error:
            if not self._processes:
                raise FedNormError(
                    f"No process could be started for the clients ({error}). The record keeps the last good round; "
                    "--workers 1 needs no process beside this one."
                ) from error
            log.debug("no more than %d workers: %s", len(self._processes), error)
            self._count = len(self._processes)

    def _listen(self, turns: _Turns, seconds: float | None) -> None:
        """Take what the processes have to give; without ``seconds``, wait until one has something."""
        ready = wait([process.connection for process in self._processes], seconds)
        for process in [process for process in self._processes if process.connection in ready]:
            try:
                turns.came(*process.take())
            except EOFError:
                (code,) = self._end([process])
                log.debug("a worker died with exit code %d", code)
                turns.take_back(list(process.jobs.values()), code)

    def _end(self, processes: Sequence[Process]) -> list[int]:
        self._processes = [process for process in self._processes if process not in processes]
        return [process.end() for process in processes]

    def _lengths(self, jobs: Sequence[Job]) -> list[int]:
        """Return how much each job is, as far as that is known: the images it is about."""
        clients = self._bench.federation.clients
        if jobs[0].kind == "train":
            return [len(clients[job.client].train) for job in jobs]
        return [len(clients[job.client].test) + len(clients[job.client].validation) for job in jobs]

    def _window(self, jobs: Sequence[Job]) -> int:
        """Return how far ahead of the next answer a job may be begun: of all updates, memory holds only some."""
        size = sum(nbytes(record.values()) for record in jobs[0].content.array_records.values())
        if jobs[0].kind != "train" or not size:
            return len(jobs)
        return max((SLOTS + 1) * self._count, HELD // size)


class _Turns:
    """Which jobs wait, and what has come of the others.

    Args:
        jobs: All of them.
        lengths: How much each of them is.
        window: How far ahead of the next answer a job may be begun.
    """

    def __init__(self, jobs: Sequence[Job], lengths: Sequence[int], window: int) -> None:
        self.jobs = jobs
        self._lengths, self._window = lengths, window
        self._heap: list[tuple[int, int]] = []
        self._again: deque[int] = deque()
        self._tries: Counter[int] = Counter()
        self._done: dict[int, Done] = {}
        self._next = self._open = 0
        self._widen()

    @property
    def left(self) -> bool:
        """Whether answers are still to be given out."""
        return self._next < len(self.jobs)

    @property
    def ready(self) -> bool:
        """Whether the next answer is there."""
        return self._next in self._done

    @property
    def waiting(self) -> int:
        """How many jobs may be begun now."""
        return len(self._heap) + len(self._again)

    def pop(self) -> int:
        """Return the number of the job to begin: one that a dead worker had, or the longest."""
        return self._again.popleft() if self._again else heapq.heappop(self._heap)[1]

    def came(self, number: int, done: Done) -> None:
        """Take in what came of a job."""
        self._done[number] = done

    def next(self) -> tuple[Job, Done]:
        """Return the next job, and what came of it."""
        job, done = self.jobs[self._next], self._done.pop(self._next)
        self._next += 1
        self._widen()
        return job, done

    def take_back(self, numbers: Sequence[int], code: int) -> None:
        """Let the jobs of a worker that died be begun again; the first one, that it was at, not for ever.

        Args:
            numbers: The jobs that it had.
            code: Its exit code.
        """
        self._again.extendleft(reversed(numbers))
        if not numbers:
            return
        suspect = numbers[0]
        self._tries[suspect] += 1
        if self._tries[suspect] >= TRIES:
            self._again.remove(suspect)
            self._done[suspect] = Done(Failure(_died(code)), {}, ())

    def _widen(self) -> None:
        last = min(len(self.jobs), self._next + self._window)
        for number in range(self._open, last):
            heapq.heappush(self._heap, (-self._lengths[number], number))
        self._open = max(self._open, last)


def _lent(bench: Workbench, job: Job) -> Answer:
    """Carry out a job in a worker, which copies what comes of it at once."""
    bench.lends = True
    return answer(bench, job)


def _keep(job: Job, done: Done) -> None:
    """Change what a client keeps."""
    state = job.context.state
    for name in done.dropped:
        del state[name]
    for name, record in done.kept.items():
        state[name] = record


def _died(code: int) -> str:
    """Return why a client did not answer whose workers died."""
    if code == -signal.SIGKILL:
        how = "was killed, as a system does that has no memory left (fewer workers need less)"
    elif code < 0:
        how = f"was ended by signal {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}"
    return f"the process that this client was trained or evaluated in {how}, {TRIES} times"
