"""The signals that end a command: Ctrl-C, a closed terminal, a polite kill; each lets what is open be put in order.

By default ``SIGTERM``, ``SIGHUP`` and ``SIGQUIT`` end a process where it stands: its files half written, the processes
that it has started left behind. Within :func:`raising` they end it by an exception, as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENDING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
)
"""The signals, those that this system has."""

REPEAT_SECONDS = 2.0
"""A signal but Ctrl-C that comes again within so long is the same one: a closed terminal tells a process twice."""


class Terminated(SystemExit):
    """A signal but Ctrl-C ends the process, which leaves with 128 + its number, as a shell would say.

    Args:
        signum: The signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def exit_code(stop: BaseException) -> int:
    """Return the exit code of a command that was ended by a KeyboardInterrupt or by :class:`Terminated`."""
    return 128 + (stop.signum if isinstance(stop, Terminated) else signal.SIGINT)


def name_of(code: int) -> str:
    """Return the name of the signal that an exit code stands for: ``SIGTERM`` for 143."""
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"signal {code - 128}"


def raise_stop(error: BaseException) -> None:
    """Raise the signal's exception in the middle of which an error was raised, if there is one.

    What puts things in order while a run is being stopped may fail itself: the disk is full. The failure takes the
    place of the stop then. Whoever takes failures for a run's, or a client's, and goes on, must not forget the stop.

    Raises:
        KeyboardInterrupt: There is one.
        Terminated: Likewise.
    """
    seen: set[int] = set()
    within: BaseException | None = error
    while within is not None and id(within) not in seen:
        if isinstance(within, KeyboardInterrupt | Terminated):
            raise within from error
        seen.add(id(within))
        within = within.__cause__ or within.__context__


@dataclass
class _State:
    """How a signal is met at present; one for the process, as signals are.

    Attributes:
        starting: Whether it ends the process at once, nothing being open.
        held: Whether it waits, because what is open is being put in order.
        waiting: The first that came meanwhile.
        last: When the last one was raised.
    """

    starting: bool = False
    held: bool = False
    waiting: int = 0
    last: float = -REPEAT_SECONDS


_state = _State()


def _meet(signum: int, _frame: object) -> None:
    if _state.starting:
        os._exit(128 + signum)  # an exception in the middle of torch's import would be told in a dozen lines
    if _state.held:
        _state.waiting = _state.waiting or signum
        return
    _raise(signum)


def _raise(signum: int) -> None:
    now = time.monotonic()
    again, _state.last = now - _state.last < REPEAT_SECONDS, now
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    if not again:
        raise Terminated(signum)


def unblock() -> None:
    """Let this process hear the signals of :data:`ENDING`, also where the one that started it had blocked them.

    A blocked signal is inherited like an ignored one. To ignore Ctrl-C is a wish (``nohup``, a shell's ``&``) and
    stays; to have it blocked is nobody's: a thread that starts a command hands down what it needed for itself, and
    Ctrl-C and a polite kill would wait for ever. For a command's own process; a program that calls us keeps its mask.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


@contextmanager
def raising() -> Iterator[None]:
    """Let every signal of :data:`ENDING` end a block by an exception: KeyboardInterrupt, or :class:`Terminated`.

    A signal that is ignored stays so (``nohup``), and one that somebody else handles is left to them. Outside the main
    thread this does nothing, since Python's handlers run there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in ENDING if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, _meet) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:  # what nobody has met by now is of a block that is over
            _state.waiting = 0


@contextmanager
def starting() -> Iterator[None]:
    """Let a signal end the process at once and without a word within a block that opens nothing: it imports, or looks.

    An import that an exception cuts short fails in words of its own, and another one after it.
    """
    before, _state.starting = _state.starting, True
    try:
        yield
    finally:
        _state.starting = before


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait until a block has put things in order; the first is raised after it.

    Where the block fails, its error goes first, and the signal is raised after the next one: of a study, the run has
    failed, and no other is begun. Use it within :func:`raising`; elsewhere, and outside the main thread, it does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _state.held = _state.held, True
    try:
        yield
    finally:
        _state.held = before
    if _state.waiting and not before:
        signum, _state.waiting = _state.waiting, 0
        _raise(signum)
