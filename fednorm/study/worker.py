"""One run after another in a process of its own, which tells how each goes; and the same in this process.

A worker has a pipe to itself: one that is killed in the middle of a word harms nobody else, as it would with a queue
that all write to.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fednorm.cards import NORMS
from fednorm.config import RunConfig
from fednorm.cores import share_cores
from fednorm.errors import FedNormError
from fednorm.signals import raise_stop

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

    from fednorm.federation.workbench import Workbench
    from fednorm.streams.workbench import ContinualWorkbench

log = logging.getLogger("fednorm")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: Rounds or steps done.
        total: Rounds or steps of the whole run.
        unit: ``round`` or ``step``.
        accuracy: The accuracy so far, in [0, 1]; None before the first evaluation.
    """

    done: int
    total: int
    unit: str
    accuracy: float | None


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        result: Its result, or None.
        reason: Why there is none.
        error: The class of the error that ended it.
        trace: Where it was raised, if it is a mistake of the program's.
    """

    result: dict[str, Any] | None
    reason: str = ""
    error: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Ready:
    """A worker has started."""


Tell = Callable[[Progress], None]

Log = Callable[[Any], AbstractContextManager[tuple[Any, Callable[[Mapping[str, Any]], None]]]]
"""What tells others of a run: of the observer of one it makes a context, with the observer that the run is given and
what takes its result. It is called in the run's process, so it can be pickled."""


@contextmanager
def unlogged(observer: Any) -> Iterator[tuple[Any, Callable[[Mapping[str, Any]], None]]]:
    """Tell nobody else of a run."""
    yield observer, lambda _: None


Context: TypeAlias = "SpawnContext | ForkServerContext"


def context_for(kinds: Collection[str]) -> Context:
    """Return what starts workers for runs of these kinds.

    On Linux they are forked off a process that has imported what they need and done nothing else, so that no thread of
    PyTorch's is lost in a fork; it is started with the first, and ends with this process. Elsewhere, where system
    libraries do not bear a fork, each is a process from scratch, which imports PyTorch for itself.

    Args:
        kinds: Of runs, one or several (:data:`~fednorm.config.schema.KINDS`).
    """
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")
    norms = (f"{NORMS.package}.{name}" for name in NORMS.built_in)
    modules = dict.fromkeys(module for kind in sorted(kinds) for module in _SIMULATE[kind])
    context.set_forkserver_preload([*modules, *norms])
    return context


_SIMULATE: Mapping[str, tuple[str, ...]] = {
    "continual": ("fednorm.streams.simulate",),
    "federated": ("fednorm.federation.simulate",),
    "federated_continual": ("fednorm.federation.simulate", "fednorm.federated_continual.workbench"),
}
"""Of each kind of run, the modules that import what it needs."""


def attempt(config: RunConfig, runs: Path, tell: Tell, log_to: Log = unlogged) -> Ended:
    """Run one configuration, or go on with it; what fails is a reason, not an exception.

    Args:
        config: The run.
        runs: The folder of records.
        tell: Is told how it goes.
        log_to: Who else is told.

    Raises:
        KeyboardInterrupt: The study is being stopped; also where that made the run fail.
        Terminated: Likewise.
    """
    try:
        return Ended(_simulate(config, runs, tell, log_to))
    except Exception as error:
        raise_stop(error)
        if isinstance(error, FedNormError):
            return Ended(None, str(error), type(error).__name__)
        # A mistake of ours: the other runs go on.
        return Ended(None, f"{type(error).__name__}: {error}", type(error).__name__, traceback.format_exc())


def _simulate(config: RunConfig, runs: Path, tell: Tell, log_to: Log) -> dict[str, Any]:
    """Run a configuration of either kind; what trains is imported only here, in the run's own process."""
    if config.kind == "continual":
        from fednorm.streams.simulate import simulate as simulate_stream

        with log_to(_Steps(tell)) as (observer, end):
            result = simulate_stream(config, runs=runs, observer=observer)
            end(result)
            return result
    from fednorm.federation.simulate import simulate

    with log_to(_Rounds(tell)) as (observer, end):
        result = simulate(config, runs=runs, observer=observer)
        end(result)
        return result


class _Rounds:
    """Tells how a federated run goes."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._total = tell, 0
        self._accuracy: float | None = None

    def begin(self, bench: Workbench, first_round: int) -> None:
        self._total = bench.num_rounds
        self._tell(Progress(first_round - 1, self._total, "round", None))

    def round(self, line: Mapping[str, Any]) -> None:
        self._accuracy = line.get("mean", self._accuracy)
        self._tell(Progress(line["round"], self._total, "round", self._accuracy))


class _Steps:
    """Tells how a continual run goes, twice a second."""

    EVERY = 0.5

    def __init__(self, tell: Tell) -> None:
        self._tell, self._total, self._done, self._next = tell, 0, 0, 0.0
        self._memorization = False
        self._accuracy: float | None = None

    def begin(self, bench: ContinualWorkbench, first_step: int, total_steps: int) -> None:
        self._total, self._memorization = total_steps, bench.stream.memorization
        self.step(first_step)

    def step(self, steps_done: int) -> None:
        self._done, now = steps_done, time.monotonic()
        if now >= self._next:
            self._next = now + self.EVERY
            self._tell(Progress(steps_done, self._total, "step", self._accuracy))

    def experience(self, line: Mapping[str, Any]) -> None:
        seen = [score for score in line["accuracy"][: line["experience"] + 1] if score is not None]
        average = sum(seen) / len(seen) if seen else None
        self._accuracy = line["train_accuracy"] if self._memorization else average
        self._tell(Progress(self._done, self._total, "step", self._accuracy))


class Worker:
    """A process for runs, from the side of its parent; it is started at once.

    Args:
        context: Starts processes: that of :func:`context_for`.
        runs: The folder of records.
        among: How many workers share the cores.
        log_to: Who is told of the runs beside this process.

    Attributes:
        connection: Readable when the worker has something to say, or has ended.
        config: The run it is at, None when it is at none.
        ready: Whether it has come as far as to take runs.
        dead: Whether it has ended without being asked.
    """

    PATIENCE = 10.0
    """Seconds in which a worker that was asked to end may put its files in order."""

    def __init__(self, context: Context, runs: Path, among: int = 1, log_to: Log = unlogged) -> None:
        self.connection, far = context.Pipe()
        self.config: RunConfig | None = None
        self.ready = self.dead = False
        with _for_children():
            arguments = (far, runs, among, dict(os.environ), log_to)
            self._process = context.Process(target=serve, args=arguments, daemon=True, name="fednorm worker")
            try:
                self._process.start()
            except EOFError as error:  # of the process that workers are forked off
                raise FedNormError(f"No process for the study's runs could be started. {_remedy()}") from error
        far.close()

    def run(self, config: RunConfig) -> None:
        """Let the worker run a configuration."""
        self.config = config
        with suppress(BrokenPipeError):  # it has ended, and says so when it is listened to
            self.connection.send(config)

    def hear(self) -> Progress | Ended | None:
        """Return what the worker says of its run; an end of the worker itself is the end of its run.

        Raises:
            FedNormError: The worker could not even start.
        """
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            return self._gone()
        if isinstance(said, Ready):
            self.ready = True
            return None
        assert isinstance(said, Progress | Ended)
        return said

    def _gone(self) -> Ended:
        self._process.join()
        self.dead = True
        code = self._process.exitcode or 0
        if code >= 0 and not self.ready:
            raise FedNormError(
                f"A process for the study's runs ended before it could begin (exit code {code}); what it said stands "
                f"above. {_remedy()}"
            )
        return Ended(None, how_it_died(code), "Killed")

    def ask_to_end(self, *, at_once: bool) -> None:
        """Ask the worker to end: when it has nothing to do, or in the middle of a run."""
        self.connection.close()
        if at_once:
            self._process.terminate()

    def see_it_end(self) -> None:
        """Wait for a worker that was asked to end, and end it if it does not."""
        self._process.join(self.PATIENCE)
        self.kill()

    def kill(self) -> None:
        """End the worker without asking."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _remedy() -> str:
    """Return what helps when no process can be started: a script is told how, the command line has no part in it."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None) or ""
    if (spec is not None and spec.name.startswith("fednorm.")) or Path(path).stem == "fednorm":
        return "Let the runs be made one at a time, in this process: --jobs 1."
    return (
        "A script that starts processes must do so under \"if __name__ == '__main__':\"; or let the runs be made one "
        "at a time in this process (jobs=1, --jobs 1)."
    )


def how_it_died(code: int) -> str:
    """Return the sentence for a worker that ended in the middle of a run.

    Args:
        code: Its exit code; negative for a signal.
    """
    if code >= 0:
        return f"its process ended by itself with exit code {code}; run it alone to see why"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = (
        ". The system does so when memory runs out: take fewer --jobs, a smaller batch or fewer images. The same "
        "command goes on from the run's checkpoint"
        if -code == signal.SIGKILL
        else ""
    )
    return f"its process was killed by {name}{hint}"


OF_THE_TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


@contextmanager
def _for_children() -> Iterator[None]:
    """Give processes that are started what they inherit from their first moment on.

    One OpenMP thread each, since the runs share the cores among them. No signal of the terminal, which tells all its
    processes: the parent alone decides, and none of them dies with a traceback.
    """
    resource_tracker.ensure_running()  # started later, it would take the signals' block off
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TERMINAL)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came meanwhile is raised here, the rest being in order


def serve(
    connection: Connection, runs: Path, among: int, environment: Mapping[str, str], log_to: Log = unlogged
) -> None:
    """Be a worker: take configurations from the pipe, run them, tell how they go; end when the pipe is closed.

    Args:
        connection: The worker's end of the pipe.
        runs: The folder of records.
        among: How many workers share the cores.
        environment: The parent's environment variables; the process that this one was forked off may have older ones.
        log_to: Who is told of the runs beside the parent.
    """
    share_cores(among)
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_TERMINAL)
    signal.signal(signal.SIGTERM, _leave)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_outlive_no_parent, daemon=True).start()
    os.dup2(2, 1)  # standard output is the parent's: one JSON document, say
    try:
        connection.send(Ready())
        while True:
            connection.send(attempt(connection.recv(), runs, connection.send, log_to))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # files are closed; taking all of torch down in order would keep the user waiting
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


class _Terminated(BaseException):
    """The parent, or somebody else, wants the worker to end now."""


def _leave(*_: object) -> None:
    raise _Terminated


def _outlive_no_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
