"""One worker: a process that is forked from this one and carries out jobs at its copy of the workbench.

Two jobs may be in it at a time, each in a slot with memory of its own: while the parent uses the reply to one, the
worker is at the next. Through the pipe go only numbers: which slot, and where in its memory the header of a parcel is.

The process ends with its parent, however that ends: the system is asked to see to it (Linux), and the pipe closes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from flwr.app import Context, RecordDict

from fednorm.federation.executors import Answer, Failure, Job
from fednorm.federation.executors.arena import Arena, Named, Parcel, Receiver, Record, Sender
from fednorm.signals import ENDING

SLOTS = 2
"""Jobs that are in a worker at a time: one that it is at, and the next."""

_WORD = struct.Struct("<6q")
"""A slot, and its parcel; the number of what all clients are sent, and its parcel, or zeros where it is not meant."""

_NOTHING = (0, 0, 0)

_PDEATHSIG = 1
"""Linux's number for ``prctl``: the signal that a process gets when its parent has ended."""

Carry = Callable[[Job], Answer]
"""How a worker carries out a job; the job's context is its own."""


class _Slot(NamedTuple):
    inbox: Arena
    outbox: Arena


class Done(NamedTuple):
    """What came of a job.

    Attributes:
        answer: What is sent back.
        kept: The records of the client's state that are new, by name.
        dropped: Names of those that are gone.
    """

    answer: Answer
    kept: dict[str, Record]
    dropped: tuple[str, ...]


class Broadcast:
    """What all clients of a round are sent, written once.

    Attributes:
        number: How often something was written.
        parcel: Where it lies.
    """

    def __init__(self) -> None:
        self.arena = Arena()
        self.number, self.parcel = 0, Parcel(0, 0)

    def write(self, content: RecordDict) -> None:
        """Write what all are sent; no worker may be at anything."""
        self.number += 1
        self.parcel = Sender(self.arena).send(content.items())


class Process:
    """A worker, from the side of its parent; it is started at once.

    Args:
        carry: How it carries out a job.
        broadcast: Where it finds what all clients are sent.
        threads: PyTorch threads.
        others: Pipes of the parent that the worker must not hold open.

    Raises:
        OSError: The system starts no process.
    """

    def __init__(self, carry: Carry, broadcast: Broadcast, threads: int, others: Iterable[Connection]) -> None:
        self.connection, far = Pipe()
        self._broadcast = broadcast
        self._slots = [_Slot(Arena(), Arena()) for _ in range(SLOTS)]
        self._senders = [Sender(slot.inbox) for slot in self._slots]
        self._receivers = [Receiver(slot.outbox) for slot in self._slots]
        self._free = list(range(SLOTS))
        self.jobs: dict[int, int] = {}
        """The numbers of the jobs that it has, the one that it is at first, by slot."""
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # of threads: those that a parent may have (a progress bar's) are not used here
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _begin(parent, far, (self.connection, *others), lambda: _serve(far, carry, broadcast, self._slots, threads))
        far.close()

    @property
    def free(self) -> bool:
        """Whether it can take one more job."""
        return bool(self._free)

    def give(self, number: int, job: Job, *, shared: bool) -> None:
        """Give it a job.

        Args:
            number: The job's.
            job: The job.
            shared: Whether its content is what all clients are sent.
        """
        slot = self._free.pop()
        self.jobs[slot] = number
        records = [*_named("state", job.context.state), *(() if shared else _named("content", job.content))]
        parcel = self._senders[slot].send(records, (job.kind, job.client, job.context.node_id))
        common = (self._broadcast.number, *self._broadcast.parcel) if shared else _NOTHING
        with suppress(OSError):  # it has died, and is seen to have when it is listened to
            self.connection.send_bytes(_WORD.pack(slot, *parcel, *common))

    def take(self) -> tuple[int, Done]:
        """Return the number of a job and what came of it.

        Raises:
            EOFError: The process has ended.
        """
        try:
            slot, begin, nbytes, *_ = _WORD.unpack(self.connection.recv_bytes())
        except OSError as error:
            raise EOFError from error
        about, records = self._receivers[slot].receive(Parcel(begin, nbytes), copy=True)
        self._free.append(slot)
        return self.jobs.pop(slot), _done(about, records)

    def end(self) -> int:
        """End the process, if it has not ended, and return its exit code: a signal's number is negative."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.connection.close()
        for arena in (arena for slot in self._slots for arena in slot):
            arena.close()
        with suppress(ChildProcessError):  # somebody else has waited for it
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return -signal.SIGKILL


def forks_train() -> bool:
    """Return whether a process that is forked off this one can compute gradients; it is tried.

    At its first backward pass PyTorch starts a thread for every device that is there by its own account: a GPU, or
    what torch.export and torch.compile pretend. From then on it refuses gradients in processes that are forked off.
    """
    with warnings.catch_warnings():  # of threads, as below
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.autograd.backward(torch.ones(1, requires_grad=True).sum())
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _named(place: str, records: RecordDict) -> list[Named]:
    return [(f"{place}/{name}", record) for name, record in records.items()]


def _of(place: str, records: Iterable[Named]) -> dict[str, Record]:
    return {name.partition("/")[2]: record for name, record in records if name.startswith(f"{place}/")}


def _done(about: Any, records: Sequence[Named]) -> Done:
    reason, dropped = about
    answer = Failure(reason) if reason is not None else RecordDict(_of("reply", records))
    return Done(answer, _of("state", records), dropped)


# The child's side ---------------------------------------------------------------------------------------------------


def _begin(parent: int, own: Connection, strangers: Iterable[Connection], serve: Callable[[], None]) -> None:
    """Be a worker, and never return: what is open on the parent's side of the fork is not this process's to close."""
    code = 1
    try:
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches all processes of a terminal; the parent sees to it
        _end_with(parent)
        for connection in strangers:
            connection.close()
        _write_anew()
        gc.freeze()  # what was there is looked at no more, and stays shared with the parent
        serve()
        code = 0
    except BaseException:
        code = 1
    finally:
        own.close()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _write_anew() -> None:
    """Write past the parent's buffers, of which a thread of it (a progress bar's) may hold the locks."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        with suppress(OSError):  # a process may have neither
            setattr(sys, name, open(number, "w", buffering=1, closefd=False, errors="backslashreplace"))  # noqa: SIM115


def _end_with(parent: int) -> None:
    """Ask the system to kill this process when its parent ends; where it does not, the pipe tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _serve(link: Connection, carry: Carry, broadcast: Broadcast, slots: Sequence[_Slot], threads: int) -> None:
    """Carry out jobs until the pipe closes."""
    torch.set_num_threads(threads)
    receivers, senders = [Receiver(slot.inbox) for slot in slots], [Sender(slot.outbox) for slot in slots]
    common, seen = RecordDict(), 0
    while True:
        try:
            slot, begin, nbytes, number, *parcel = _WORD.unpack(link.recv_bytes())
        except (EOFError, OSError):
            return
        if number > seen:
            _, records = Receiver(broadcast.arena).receive(Parcel(*parcel), copy=False)
            common, seen = RecordDict(dict(records)), number
        about, records = receivers[slot].receive(Parcel(begin, nbytes), copy=False)
        content = common if number else RecordDict(_of("content", records))
        reply = _carried(carry, _job(about, content, RecordDict(_of("state", records))), senders[slot])
        try:
            link.send_bytes(_WORD.pack(slot, *reply, *_NOTHING))
        except OSError:
            return


def _job(about: Any, content: RecordDict, state: RecordDict) -> Job:
    kind, client, node = about
    config: dict[str, str | int | float | bool] = {"partition-id": client}
    return Job(kind, client, content, Context(run_id=1, node_id=node, node_config=config, state=state, run_config={}))


def _carried(carry: Carry, job: Job, sender: Sender) -> Parcel:
    """Carry out a job, and lay out what comes of it: the answer, and what is new in the client's state."""
    state = job.context.state
    before = dict(state.items())
    try:
        answer = carry(job)
        reason, reply = (answer.reason, RecordDict()) if isinstance(answer, Failure) else (None, answer)
        kept = [(f"state/{name}", record) for name, record in state.items() if before.get(name) is not record]
        dropped = tuple(name for name in before if name not in state)
        return sender.send([*kept, *_named("reply", reply)], (reason, dropped))
    except Exception as error:
        return sender.send((), (f"{type(error).__name__}: {error}", ()))
