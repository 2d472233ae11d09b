"""One thread a process for every test, and a process that runs configurations in children which die where a test says.

One thread, because the last bits of sums depend on the number, and because two busy processes share the cores.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Two busy cores are slow, and that is no fault of what is drawn. CI draws more: --hypothesis-profile=many.
settings.register_profile("few", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("many", settings.get_profile("few"), max_examples=300)
settings.load_profile("few")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch


def pytest_sessionstart(session: pytest.Session) -> None:
    """Heed again what ``nohup`` or a shell's ``&`` made this process ignore: tests send themselves such signals."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # its workers run the tests
    os.fsync = lambda _: None  # type: ignore[assignment]  # no test pulls a plug, and they would wait for the disk
    for name in ("SIGINT", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    # The first backward pass of a process decides whether those forked off it can have one; a test that exports or
    # compiles before it would take them their workers.
    import torch

    torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_finish() -> None:
    """Keep the many thousand tests and what they import out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let all of it go at the end, or libraries report what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Iterator[None]:
    """Fail a test that leaves a signal blocked or met another way: what later tests start would inherit it."""
    before = _signals()
    yield
    if (after := _signals()) != before:
        for number, handler in before[0].items():
            signal.signal(number, handler)
        if BLOCKS:
            signal.pthread_sigmask(signal.SIG_SETMASK, before[1])
        pytest.fail(f"signals were met so before: {before}, and now: {after}")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests decode out of the user's cache, where nobody would miss it."""
    from fednorm.data.cache import cache_folder
    from fednorm.data.digits_mini import read_digits_mini

    cache = tmp_path_factory.mktemp("cache")
    for size in (8, 28):  # what most tests read is drawn once a machine
        if not any(cache_folder().glob(f"digits_mini-{size}-*.npy")):
            read_digits_mini(size)
    for path in cache_folder().glob("digits_mini-*.npy"):
        (cache / path.name).symlink_to(path.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDNORM_CACHE", str(cache))
        yield cache


BLOCKS = hasattr(signal, "pthread_sigmask")
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


def _signals() -> tuple[dict[int, Any], set[Any]]:
    handlers = {number: signal.getsignal(number) for number in ENDING}
    return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ()) if BLOCKS else set()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tier what ``@pytest.mark.cover(n)`` does not need of a product of parameters.

    What stays in the default tier holds every n values of different parameters together: with 1 each value, with 2
    each pair. Of a test with ``@pytest.mark.few(n)`` n cases stay, evenly spread: each of them takes long.
    """
    _leave_few(items)
    products: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("cover") and not item.get_closest_marker("slow"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in products.values():
        (n,) = cases[0].get_closest_marker("cover").args
        for case in _beyond_a_covering(cases, n):
            case.add_marker(pytest.mark.slow)


def _leave_few(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in cases.values():
        (n,) = several[0].get_closest_marker("few").args  # type: ignore[union-attr]
        kept = {number * len(several) // n for number in range(n)}
        for number, case in enumerate(several):
            if number not in kept:
                case.add_marker(pytest.mark.slow)


def _beyond_a_covering(cases: list[Any], n: int) -> list[Any]:
    """Return the cases whose every n values are those of other cases too, taken greedily."""
    values = [sorted((name, repr(value)) for name, value in case.callspec.params.items()) for case in cases]
    held = [set(itertools.combinations(each, n)) for each in values]
    missing, chosen, used = set().union(*held), set(), Counter[Any]()
    while missing:
        # Of those that add as much, one whose values were taken least.
        gain = [(len(each & missing), -sum(used[value] for value in each)) for each in held]
        best = gain.index(max(gain))
        chosen.add(best)
        missing -= held[best]
        used.update(held[best])
    return [case for number, case in enumerate(cases) if number not in chosen]


LAUNCHER = """
import json, os, resource, signal, sys
from pathlib import Path

import torch

import fednorm.records.record as record
from fednorm.errors import FedNormError

torch.set_num_threads(1)


def before(owner, name, when, act):
    whole = getattr(owner, name)

    def patched(*args, **kwargs):
        if when(*args, **kwargs):
            act(*args, **kwargs)
        return whole(*args, **kwargs)

    setattr(owner, name, patched)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(self, line):
    with self._journal.path.open("a") as file:
        file.write(json.dumps(line)[:40])
    die()


class Watch:
    def __init__(self, where, n):
        self.where, self.n = where, n

    def begin(self, *_):
        pass

    def step(self, done):
        if self.where == "after the step" and done == self.n:
            die()

    def ended(self, line):
        if line[UNIT] == self.n:
            if self.where == f"after the {UNIT}":
                die()
            if self.where == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.where == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

    round = experience = ended


def arm(where, n):
    rec, checkpoints = record.RunRecord, []
    if where == "before the line":
        before(rec, "append_line", lambda self, line: line[UNIT] == n, die)
    elif where == "in the line":
        before(rec, "append_line", lambda self, line: line[UNIT] == n, half_a_line)
    elif where == "in the checkpoint":
        def nth(part, name):
            checkpoints.extend([1] if str(name).endswith("checkpoint.safetensors") else [])
            return len(checkpoints) == n
        before(os, "replace", nth, die)
    elif where == "before the result":
        before(rec, "finish", lambda *_, **__: True, die)
    elif where == "in the result":
        before(os, "replace", lambda part, name: str(name).endswith("result.json"), die)
    else:
        arm_own(where, n)
    return Watch(where, n)


kinds = {}  # what a kind of run says of itself: see Launcher
for request in map(json.loads, sys.stdin):
    if request["kind"] not in kinds:
        of_kind = dict(globals())
        exec(request["kind"], of_kind)
        kinds[request["kind"]] = {name: value for name, value in of_kind.items() if name not in globals()}
        of_kind["simulate"](of_kind["resolve"](request["values"]), runs=None)  # imports and reads what children need
    pid = os.fork()
    if pid == 0:
        code = 0
        globals().update(kinds[request["kind"]])
        try:
            observer = arm(request["where"], request["n"])
            simulate(resolve(request["values"]), runs=Path(request["runs"]), observer=observer)
        except FedNormError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path(request["runs"], "error.txt").write_text(f"{type(error).__name__}: {error}")
            code = 3
        os._exit(code)
    _, status = os.waitpid(pid, os.WUNTRACED)
    how = "stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    print(json.dumps([pid, how]), flush=True)
"""


class Launcher:
    """Runs configurations in child processes, which end where and when they are told to.

    Where: ``before the line``, ``in the line`` and ``after the UNIT`` number n, ``in the checkpoint``, the n-th,
    ``before the result``, ``in the result``; ``stop`` and ``disk full`` after the unit number n; and the kind's own.

    Args:
        kind: Python that imports ``simulate`` and ``resolve`` and defines ``UNIT``, what n counts and a line tells of,
            ``ROOM``, the bytes that fit a file on a full disk, and ``arm_own(where, n)`` for the kind's own places,
            which may call ``before(owner, name, when, act)`` and ``die``.
        process: What forks them: one for all kinds, because its imports take seconds. Of each kind it first runs a
            configuration itself, to import and read what all children need.
    """

    def __init__(self, kind: str, process: subprocess.Popen[str]) -> None:
        self._kind, self._process = kind, process

    def run(self, values: dict[str, Any], runs: Path, where: str, n: int) -> tuple[int, int | str]:
        """Return a child's process id, and its exit code (negative for a signal) or ``stopped``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"kind": self._kind, "values": values, "runs": str(runs), "where": where, "n": n}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        pid, how = json.loads(self._process.stdout.readline())
        return pid, how


class Logged(logging.Handler):
    """What is logged during a test.

    pytest's plugin for it is off: six times a test it asks each of a thousand loggers, which adds up to seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.message = record.getMessage()
        if record not in self.records[-1:]:  # a logger that hands on what it is told would have it twice
            self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.message for record in self.records]


@pytest.fixture
def logged() -> Iterator[Logged]:
    """What is logged, Flower's own messages too, which it keeps from the root logger."""
    heard, handler = [logging.getLogger(), logging.getLogger("flwr")], Logged()
    for logger in heard:
        logger.addHandler(handler)
    yield handler
    for logger in heard:
        logger.removeHandler(handler)


@pytest.fixture
def own_declarations() -> Iterator[None]:
    """Forget, after a test, the layers that it declared."""
    from fednorm.recognition.layers import DECLARED

    before = dict(DECLARED)
    yield
    DECLARED.clear()
    DECLARED.update(before)


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[[str], Launcher]]:
    """Make a launcher of a kind of run; their one process ends with the tests."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    yield lambda kind: Launcher(kind, process)
    process.kill()
    process.communicate()
