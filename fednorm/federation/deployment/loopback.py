"""A folder of ``fednorm deploy init`` run on this machine alone: its scripts, in a copy, on free ports of 127.0.0.1.

The folder itself is left as it is: nothing of its state, its records or its data is touched, and a SuperLink that runs
from it already is not disturbed. All that is started is ended by its process id.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from fednorm.config import RunConfig, resolve
from fednorm.errors import AggregationError, ConfigError
from fednorm.federation.deployment.folder import NAME
from fednorm.federation.flower_runtime import RunningSuperLink
from fednorm.federation.processes import ProcessTree, free_port, listens, own_processes

REGISTER_SECONDS = 120.0
"""Time for the script that registers the sites' keys."""

CERTIFICATE = Path("certificates/ca.crt")
"""What the SuperLink's certificate is checked against, in the folder."""

_LOCAL = "127.0.0.1"
_SERVER_SCRIPTS = ("superlink", "register")


def read_run(folder: Path) -> RunConfig:
    """Return the run of a folder.

    Raises:
        ConfigError: It has none, or it is none.
    """
    path = folder / "run.toml"
    try:
        return resolve(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{path} is no run of a federation of sites: {error}. Name a folder that fednorm deploy init has written."
        ) from error


def sites_of(folder: Path, config: RunConfig) -> tuple[str, ...]:
    """Return the names of a folder's sites, for each of which it has a script.

    Raises:
        ConfigError: A script, a key or the certificate is missing, or a name is none.
    """
    sites = config.data.domains
    if not sites or any(NAME.fullmatch(name) is None for name in sites):
        raise ConfigError(f"data.domains in {folder / 'run.toml'} names the sites, each with a script; it has {sites}.")
    needed = [*(f"{name}.sh" for name in (*_SERVER_SCRIPTS, *sites)), str(CERTIFICATE)]
    needed += [f"keys/{name}" for name in sites]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ConfigError(
            f"{folder} has no {', '.join(missing)}. fednorm deploy init writes the scripts, and make-keys.sh makes the "
            "keys and certificates."
        )
    return sites


def copy_to(copy: Path, folder: Path, sites: tuple[str, ...], port: int) -> None:
    """Copy a folder's scripts, keys and certificates, with this machine's addresses in the scripts, and link its data.

    Args:
        copy: Where to; made.
        folder: The folder.
        sites: Its sites.
        port: For the SuperLink. Every node gets a free port of its own.
    """
    copy.mkdir(parents=True)
    for name in ("keys", "certificates"):
        shutil.copytree(folder / name, copy / name)
    for name in _SERVER_SCRIPTS:
        _copy_script(folder / f"{name}.sh", copy, {"address": f"{_LOCAL}:{port}", "port": str(port)})
    for site in sites:
        _copy_script(folder / f"{site}.sh", copy, {"address": f"{_LOCAL}:{port}", "port": str(free_port())})
        (copy / "data").mkdir(exist_ok=True)
        (copy / "data" / site).symlink_to((folder / "data" / site).resolve())


def _copy_script(path: Path, copy: Path, values: Mapping[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"(?<=--host )\S+", _LOCAL, text)
    text = re.sub(r"(?<=--port )\d+", values["port"], text)
    text = re.sub(r"(?<=--superlink )\S+", values["address"], text)
    text = re.sub(r'(?<=naddress = ")[^"]+', values["address"], text)
    target = copy / path.name
    target.write_text(text, encoding="utf-8")
    target.chmod(0o700)


@dataclass
class Loopback:
    """The running processes of a copied folder.

    Attributes:
        folder: The copy; ``NAME.log`` in it is what the script of that name has printed.
        port: The SuperLink's port.
        tree: All processes that were started, by their ids.
        environment: Of the processes.
    """

    folder: Path
    port: int
    tree: ProcessTree
    environment: dict[str, str]

    @property
    def superlink(self) -> RunningSuperLink:
        """Return the SuperLink as a run is handed to it."""
        return RunningSuperLink(f"{_LOCAL}:{self.port}", self.folder / CERTIFICATE)

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a script of the folder, and return its process."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return self.tree.start(["bash", str(self.folder / f"{name}.sh")], self.environment, stdout=log)

    def start_server(self) -> subprocess.Popen[bytes]:
        """Start the SuperLink, and return its process once it listens.

        Raises:
            AggregationError: It does not.
        """
        server = self.start("superlink")
        if not listens(self.tree, server, self.port):
            raise AggregationError(f"superlink.sh did not start a SuperLink:\n{self.log('superlink')}")
        return server

    def register(self) -> None:
        """Register the sites' keys.

        Raises:
            AggregationError: The SuperLink did not take them.
        """
        script = self.start("register")
        until = time.monotonic() + REGISTER_SECONDS
        while script.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        if script.returncode != 0:
            raise AggregationError(f"register.sh did not register the sites' keys:\n{self.log('register')}")

    def log(self, name: str, lines: int = 12) -> str:
        """Return the end of what a script has printed, indented."""
        path = self.folder / f"{name}.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])

    def listening(self) -> set[str]:
        """Return the addresses on which any of the processes listens now."""
        addresses = set()
        for process in self.tree.refresh():
            try:
                connections = process.net_connections(kind="inet")
            except psutil.Error:
                continue
            addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        return addresses


@contextmanager
def loopback(
    folder: Path, scratch: Path, sites: tuple[str, ...], prepare: Callable[[Path], None] = lambda _: None
) -> Iterator[Loopback]:
    """Run a folder's SuperLink and nodes on this machine; all of it has ended when the block has.

    Args:
        folder: What :func:`~fednorm.federation.deployment.folder.write_deployment` has written.
        scratch: A folder for the copy and the processes' own files.
        sites: The sites whose nodes are started.
        prepare: Is given the copy before anything is started.

    Raises:
        AggregationError: The SuperLink did not start, or does not take the sites' keys.
    """
    port, copy = free_port(), scratch / "copy"
    copy_to(copy, folder, sites, port)
    prepare(copy)
    with own_processes(scratch) as (tree, environment):
        running = Loopback(copy, port, tree, environment)
        running.start_server()
        running.register()
        for name in sites:
            running.start(name)
        yield running
