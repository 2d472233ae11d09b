"""Processes of Flower's, started on this machine and ended by their ids: none is left, and no stranger is hit.

Whatever is started within :func:`own_processes` has an environment of its own (a ``FLWR_HOME``, no telemetry, no
downloads, loopback only), and is ended with all its descendants when the block ends: by its end, an error, Ctrl-C or a
polite kill. Only ``SIGKILL`` leaves no chance.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from fednorm.errors import ConfigError
from fednorm.signals import held, raising

START_SECONDS = 120.0
"""Time for a server to listen; on a busy machine the imports of Flower take most of a minute."""

POLITE_SECONDS = 3.0
"""Time for processes to end after each request, of which the last is no request any more."""

_OBJECT_STORE_BYTES = 2**30


@contextmanager
def own_processes(home: Path) -> Iterator[tuple[ProcessTree, dict[str, str]]]:
    """Hand out a process tree and the environment for it; end the one and remove the other's temporary files.

    Ctrl-C, ``SIGTERM``, ``SIGHUP`` and ``SIGQUIT`` end the block by an exception; none of them cuts the cleaning short.
    """
    # Ray's sockets lie in this folder, and a socket's path may have 103 characters at most.
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 20 or os.name != "posix" else "/tmp"
    tree, ray_dir = ProcessTree(), ""
    with raising():
        try:
            with held():
                ray_dir = tempfile.mkdtemp(prefix="fednorm-", dir=short)
            yield tree, environment_of(home, ray_dir)
        finally:
            with held():
                tree.end()
                shutil.rmtree(ray_dir, ignore_errors=True)


def environment_of(home: Path, ray_dir: str) -> dict[str, str]:
    """Return the environment of everything that this launch starts."""
    environment = dict(os.environ)
    no_proxy = ",".join(filter(None, [environment.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    environment.update(
        FLWR_HOME=str(home / "flwr"),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.05",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ADDRESS="local",
        # Else Ray listens on all of this machine's interfaces, and runs what it is sent there without asking who sends
        # it. The name is Ray's, and does on Linux what it does on the systems that it is named after.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_TMPDIR=ray_dir,
        NO_PROXY=no_proxy,
        no_proxy=no_proxy,
        PYTHONUNBUFFERED="1",
        PYTHONPATH=os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        PATH=os.pathsep.join([*_script_folders(), environment.get("PATH", os.defpath)]),
    )
    environment.setdefault("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(_OBJECT_STORE_BYTES))
    return environment


def _script_folders() -> list[str]:
    """Return where this Python's console scripts may lie, the likeliest first."""
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    folders.append(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
    return list(dict.fromkeys(folders))


def command_of(name: str) -> str:
    """Return the path of one of Flower's commands: this Python's own, or else the first on PATH."""
    path = shutil.which(name, path=os.pathsep.join(_script_folders())) or shutil.which(name)
    if path is None:
        raise ConfigError(
            f"The command {name} was not found beside {sys.executable}, nor on PATH. Flower's package installs it: "
            "pip install --force-reinstall 'flwr[simulation]'."
        )
    return path


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(tree: ProcessTree, superlink: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until this very process listens on the port; ``False`` when it ends or stays silent instead."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and superlink.poll() is None:
        if tree.listens(superlink, port):
            return True
        time.sleep(0.05)
    return False


class ProcessTree:
    """All processes that descend from those started here, also those that have moved to a session of their own.

    A process is remembered by its id *and* its start time (psutil compares both), so that a number which the
    system has given to a stranger meanwhile is never touched. A descendant whose parent ends is remembered if
    :meth:`refresh` has seen it before.
    """

    def __init__(self) -> None:
        self._roots: list[subprocess.Popen[bytes]] = []
        self._known: dict[int, psutil.Process] = {}

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], *, stdout: int | IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a command in a session of its own, so that an interrupt from the terminal reaches only us."""
        with held():  # a process is known from its first moment on
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._roots.append(process)
            self._known[process.pid] = psutil.Process(process.pid)
        return process

    def listens(self, process: subprocess.Popen[bytes], port: int) -> bool:
        """Say whether this very process, and not another on the machine, listens on a TCP port."""
        try:
            connections = self._known[process.pid].net_connections(kind="tcp")
        except psutil.Error:
            return False
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)

    def refresh(self) -> list[psutil.Process]:
        """Look for new descendants; return all that are alive."""
        alive = {pid: process for pid, process in self._known.items() if is_alive(process)}
        for process in list(alive.values()):
            with suppress(psutil.NoSuchProcess):
                children = [] if process.ppid() in alive else process.children(recursive=True)
                alive.update((child.pid, child) for child in children if is_alive(child))
        self._known = alive
        return list(alive.values())

    def end(self) -> None:
        """End every process of the tree: first by asking those started here, then by asking all, at last by force."""
        self.refresh()
        for root in reversed(self._roots):
            root.terminate()
        requests: list[Callable[[psutil.Process], None]] = [psutil.Process.terminate, *[psutil.Process.kill] * 3]
        for request in requests:
            if not self._wait(POLITE_SECONDS):
                break
            for process in self.refresh():
                with suppress(psutil.NoSuchProcess):
                    request(process)
        self._wait(POLITE_SECONDS)
        for root in self._roots:  # a zombie with threads still ending cannot be reaped at once
            with suppress(subprocess.TimeoutExpired):
                root.wait(POLITE_SECONDS)

    def _wait(self, seconds: float) -> list[psutil.Process]:
        """Wait for the whole tree to end; return what is still alive."""
        deadline = time.monotonic() + seconds
        while (alive := self.refresh()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive


def is_alive(process: psutil.Process) -> bool:
    """Say whether a process still runs; one that only waits to be reaped by its parent does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
