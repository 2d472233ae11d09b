"""Run a Flower app with Flower's own simulation runtime (SuperLink, SuperExec, Ray), and tell how it went.

``flwr run`` alone has five traps, each closed here (met on 1.41.0; 1.39.0 and 1.42.0 are alike):

* It talks to whatever answers on the local default port, also to a SuperLink that another checkout left
  behind with another environment. Here each run starts a SuperLink of its own on a free port, addressed
  explicitly by a configuration in its own ``FLWR_HOME``, and asserts that *that* process holds the port.
* It leaves the SuperLink and its SuperExec running. Here all that was started is ended, by process id.
* Its exit status is that of the submission: a run that failed exits 0. Here the run's status is asked for.
* Its Ray listens on all interfaces, to whoever asks. Here all that was started listens on 127.0.0.1 alone.
* It looks up its helpers on ``PATH``, downloads the app's dependencies, and sends telemetry. Here the helpers
  are those of this Python, and nothing is downloaded or sent.

The simulation sees this process's import path, so that apps need not be installed. Ray likewise gets a folder
of its own: it would otherwise join a cluster that someone has started on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from fednorm.cores import available_cores
from fednorm.errors import AggregationError, ConfigError
from fednorm.federation.flower_app import ConfigValue, toml_lines, write_app
from fednorm.federation.processes import ProcessTree, command_of, free_port, listens, own_processes
from fednorm.signals import Terminated, held

__all__ = ["ConfigValue", "FlowerRun", "RunningSuperLink", "run_with_flower", "submit_to_flower", "write_app"]

_COMPLETED = "finished:completed"
_START_ATTEMPTS = 3
_STATUS_SECONDS = 60.0
_SUBMIT_SECONDS = 15.0
_TAIL_LINES = 25
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_STARTED = re.compile(r"Successfully started run (\d+)")


@dataclass(frozen=True)
class FlowerRun:
    """A run that Flower has finished.

    Attributes:
        run_id: Flower's number of the run.
        status: What the SuperLink said of it, ``"finished:completed"``; any other status is raised, not returned.
        exit_code: The exit status of ``flwr run``, which says nothing about the run.
        log_path: What ``flwr run`` printed, the apps' output included.
        seconds: Wall-clock time from the start of the SuperLink to the run's end.
    """

    run_id: str
    status: str
    exit_code: int
    log_path: Path
    seconds: float


@dataclass(frozen=True)
class RunningSuperLink:
    """A SuperLink that somebody has started.

    Attributes:
        address: Its address, ``host:port``.
        root_certificates: The file of the certificate authority that its own certificate is checked against; None for
            a connection that is neither encrypted nor checked.
    """

    address: str
    root_certificates: Path | None = None

    @property
    def local(self) -> bool:
        """Return whether it is on this machine, by its address."""
        return self.address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")

    def toml(self) -> str:
        """Return the lines of a ``config.toml`` of Flower's that has it, and no other."""
        trust = "insecure = true" if self.root_certificates is None else f"root-certificates = {self._certificates}"
        return f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = {json.dumps(self.address)}\n{trust}\n'

    @property
    def _certificates(self) -> str:
        return json.dumps(str(self.root_certificates and self.root_certificates.resolve()))


def submit_to_flower(
    app_dir: Path,
    superlink: RunningSuperLink,
    *,
    run_config: Mapping[str, ConfigValue],
    home: Path,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    on_stop: Callable[[str], None] = lambda _: None,
) -> FlowerRun:
    """Hand a Flower app to a SuperLink that runs already, follow its log to the end, and return what became of it.

    Where this process is interrupted or politely terminated meanwhile, the run is stopped on the SuperLink too.

    Args:
        app_dir: The app's folder (:func:`write_app`).
        superlink: Where to.
        run_config: Values for keys that the app's ``[tool.flwr.app.config]`` has.
        home: Where ``FLWR_HOME`` and the log go; outside ``app_dir``.
        timeout: Seconds until nobody waits for it any more; the run itself goes on.
        on_line: Called with each line of the log as it comes, without colours.
        on_stop: Called with a sentence on what has become of the run, when this process is interrupted or terminated.

    Raises:
        AggregationError: The run was not taken, failed, was stopped or timed out; with the reason and the log's end.
    """
    app_dir, home = app_dir.resolve(), home.resolve()
    (home / "flwr").mkdir(parents=True, exist_ok=True)
    (home / "flwr" / "config.toml").write_text(superlink.toml(), encoding="utf-8")
    overrides = home / "run-config.toml"
    overrides.write_text("\n".join(toml_lines(run_config)) + "\n", encoding="utf-8")
    command = [command_of("flwr"), "run", str(app_dir), "--stream", "--run-config", str(overrides)]
    started, log_path, number = time.monotonic(), home / "flower.log", _Number()
    with own_processes(home) as (tree, environment):
        try:
            exit_code, reason = _stream(
                tree, command, None, environment, log_path, started + timeout, on_line, number.look
            )
        except (KeyboardInterrupt, Terminated):
            with held():
                on_stop(_stopped(number, superlink, environment))
            raise
        run = _ask_status(environment, number.text) if number.text else {}
    status = str(run.get("status", "never taken"))
    if status != _COMPLETED:
        details = run.get("status-details", "") or "see its log"
        reason = reason or f"the SuperLink at {superlink.address} reports it as {status!r} ({details})"
        goes_on = number.text and "finished" not in status
        stop = f" Where it still runs, {_stop_command(number, environment)} ends it." if goes_on else ""
        raise AggregationError(
            f"The run on the SuperLink at {superlink.address} did not complete: {reason}.{stop}\n"
            f"The end of its log, {log_path}:\n{_tail(log_path)}"
        )
    return FlowerRun(number.text, status, exit_code, log_path, time.monotonic() - started)


class _Number:
    """The number that a SuperLink gives a run, told by the thread that reads the submission's log.

    Attributes:
        text: The number; empty before it is known.
    """

    def __init__(self) -> None:
        self.text = ""
        self._over = threading.Event()

    def look(self, line: str | None) -> None:
        """Look at a line of the log; None is its end."""
        if line is not None and (match := _STARTED.search(line)):
            self.text = match[1]
        if line is None or self.text:
            self._over.set()

    def wait(self, seconds: float) -> bool:
        """Wait until the number is known or the log is over; return whether either is."""
        return self._over.wait(seconds)


def _stopped(number: _Number, superlink: RunningSuperLink, environment: Mapping[str, str]) -> str:
    """Stop a run on its SuperLink, and return what has become of it."""
    answered = number.wait(_SUBMIT_SECONDS)
    if not number.text:
        lacks = "did not take the run" if answered else "has not said yet whether it takes the run: see flwr list"
        return f"The SuperLink at {superlink.address} {lacks}."
    command = [command_of("flwr"), "stop", number.text]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_STATUS_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        return (
            f"Run {number.text} goes on, on the SuperLink at {superlink.address}, which could not be told to stop it. "
            f"{_stop_command(number, environment)} ends it."
        )
    return f"Run {number.text} on the SuperLink at {superlink.address} was stopped."


def _stop_command(number: _Number, environment: Mapping[str, str]) -> str:
    return f"FLWR_HOME={shlex.quote(environment['FLWR_HOME'])} flwr stop {number.text}"


def run_with_flower(
    app_dir: Path,
    *,
    num_supernodes: int,
    run_config: Mapping[str, ConfigValue],
    home: Path,
    client_cpus: int = 1,
    client_gpus: float = 0.0,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
) -> FlowerRun:
    """Run a Flower app on a SuperLink of its own, wait for it, and end all that was started.

    Nothing is left running: not on success, failure or time-out, nor when this process is interrupted or
    terminated (only ``SIGKILL`` leaves no chance). Clients that fail do not fail a run of Flower's: it is up
    to the ServerApp to raise when too few replies are good.

    Args:
        app_dir: The app's folder, with a ``pyproject.toml`` (see :func:`write_app`).
        num_supernodes: The number of simulated clients.
        run_config: Values for keys that the app's ``[tool.flwr.app.config]`` has. Any text survives.
        home: Where this run's ``FLWR_HOME`` and logs go; outside ``app_dir``, which Flower packs.
        client_cpus: CPU cores that one client holds. As many clients train at once as fit the machine.
        client_gpus: The share of a GPU that one client holds. With 0, Ray hides the GPUs from the clients.
        timeout: Seconds until the run is given up, start and end of the runtime included.
        on_line: Called with each line of the log as it comes, without colours.

    Returns:
        The run, which Flower reports as completed.

    Raises:
        ConfigError: When the simulation extra is missing, or the arguments do not fit each other or the machine.
        AggregationError: When the run failed, stopped or timed out; with the reason and the end of the log.
    """
    app_dir, home = app_dir.resolve(), home.resolve()
    parallel_cpus = _check_request(app_dir, home, num_supernodes, run_config, client_cpus)
    federation = (
        f"num-supernodes={num_supernodes} init-args-num-cpus={parallel_cpus} "
        f"client-resources-num-cpus={client_cpus} client-resources-num-gpus={float(client_gpus)}"
    )
    command = [command_of("flwr"), "run", str(app_dir), "--stream", "--federation-config", federation]
    home.mkdir(parents=True, exist_ok=True)
    if run_config:
        overrides = home / "run-config.toml"
        overrides.write_text("\n".join(toml_lines(run_config)) + "\n", encoding="utf-8")
        command += ["--run-config", str(overrides)]

    started = time.monotonic()
    log_path = home / "flower.log"
    with own_processes(home) as (tree, environment):
        superlink = _start_superlink(tree, home, environment)
        exit_code, reason = _stream(tree, command, superlink, environment, log_path, started + timeout, on_line)
        run = {} if reason else _ask_status(environment)
    status = str(run.get("status", "never submitted"))
    if status != _COMPLETED:
        reason = reason or f"Flower reports it as {status!r} ({run.get('status-details', 'no details')})"
        raise AggregationError(
            f"The run on Flower's simulation runtime did not complete: {reason}.\n"
            f"The end of its log, {log_path}:\n{_tail(log_path)}"
        )
    return FlowerRun(str(run["run-id"]), status, exit_code, log_path, time.monotonic() - started)


def require_simulation() -> None:
    """Require what Flower's simulation runtime needs beside Flower.

    Raises:
        ConfigError: It is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "Flower's simulation runtime needs Ray, which is not installed. Install it with "
            "pip install 'fednorm[simulation]' (it is pip install 'flwr[simulation]'), or leave --runtime out: "
            "the in-process runtime needs no Ray and computes the same numbers."
        )


def _check_request(
    app_dir: Path, home: Path, num_supernodes: int, run_config: Mapping[str, ConfigValue], client_cpus: int
) -> int:
    """Refuse what cannot run, and return the number of CPU cores that Ray shall hand out."""
    require_simulation()
    if num_supernodes < 1:
        raise ConfigError(f"num_supernodes must be at least 1, got {num_supernodes}.")
    cores = available_cores()
    if not 1 <= client_cpus <= cores:
        raise ConfigError(f"client_cpus must be between 1 and this machine's {cores} cores, got {client_cpus}.")
    if home.is_relative_to(app_dir):
        raise ConfigError(f"home ({home}) lies inside the app ({app_dir}), which Flower packs. Name a folder outside.")
    project = app_dir / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(f"A Flower app has a pyproject.toml, and {app_dir} has none. Make one with write_app.")
    app = tomllib.loads(project.read_text(encoding="utf-8")).get("tool", {}).get("flwr", {}).get("app", {})
    known = set(_flat_keys(app.get("config", {})))
    if unknown := sorted(set(run_config) - known):
        raise ConfigError(
            f"Flower overrides only keys that the app declares: [tool.flwr.app.config] of {project} has "
            f"{', '.join(sorted(known)) or 'none'}, not {', '.join(unknown)}. Declare them there."
        )
    # Ray would start an actor for each share of the cores, also when there are fewer clients.
    return min(cores // client_cpus, num_supernodes) * client_cpus


def _flat_keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a table's keys as Flower spells them: nested ones joined by dots."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _start_superlink(tree: ProcessTree, home: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a SuperLink, point this ``FLWR_HOME`` at it, and return it once it listens."""
    flower_home = Path(environment["FLWR_HOME"])
    flower_home.mkdir(parents=True, exist_ok=True)
    log_path = home / "superlink.log"
    for _ in range(_START_ATTEMPTS):
        port = free_port()
        command = [command_of("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
        with log_path.open("wb") as log:
            superlink = tree.start([*command, "--port", str(port)], environment, stdout=log)
        if listens(tree, superlink, port):
            own = RunningSuperLink(f"127.0.0.1:{port}")
            (flower_home / "config.toml").write_text(own.toml(), encoding="utf-8")
            return superlink
    raise AggregationError(
        f"Flower's SuperLink did not start in {_START_ATTEMPTS} attempts. The end of its log, {log_path}:\n"
        f"{_tail(log_path)}"
    )


def _stream(
    tree: ProcessTree,
    command: list[str],
    superlink: subprocess.Popen[bytes] | None,
    environment: Mapping[str, str],
    log_path: Path,
    deadline: float,
    on_line: Callable[[str], None] | None,
    look: Callable[[str | None], None] = lambda _: None,
) -> tuple[int, str]:
    """Submit the run and follow its log to the end; return the exit status and, if it was cut short, why.

    Lines are looked at as they are read, by another thread, also when this one is not there any more.
    """
    client = tree.start(command, environment, stdout=subprocess.PIPE)
    assert client.stdout is not None
    lines: Queue[str | None] = Queue()
    threading.Thread(target=_pump, args=(client.stdout, lines, look), daemon=True).start()
    with log_path.open("w", encoding="utf-8") as log:
        while True:
            if time.monotonic() > deadline:
                return -1, "it was still running when its time was up (raise the timeout, or run fewer rounds)"
            if superlink is not None and superlink.poll() is not None:
                return -1, f"its SuperLink ended with exit status {superlink.returncode} (see superlink.log beside)"
            try:
                line = lines.get(timeout=0.5)
            except Empty:
                tree.refresh()
                continue
            if line is None:
                return client.wait(), ""
            log.write(line + "\n")
            log.flush()
            if on_line is not None:
                on_line(line)


def _pump(stream: IO[bytes], lines: Queue[str | None], look: Callable[[str | None], None]) -> None:
    """Put a stream's lines into a queue, then ``None``; each is looked at first."""
    with stream:
        for raw in stream:
            line = _ANSI.sub("", raw.decode("utf-8", errors="replace")).rstrip("\r\n")
            look(line)
            lines.put(line)
    look(None)
    lines.put(None)


def _ask_status(environment: Mapping[str, str], number: str = "") -> dict[str, Any]:
    """Return what a SuperLink says of a run, or of its only one; empty when it has none."""
    command = [command_of("flwr"), "list", "--format", "json", *(["--run-id", number] if number else [])]
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, timeout=_STATUS_SECONDS, check=False)
        runs = json.loads(answer.stdout)["runs"]
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        return {"status": "unknown", "status-details": f"`flwr list` gave no answer: {type(error).__name__}"}
    return dict(runs[0]) if runs else {}


def _tail(path: Path) -> str:
    """Return a log's last lines, indented."""
    with path.open(encoding="utf-8", errors="replace") as log:
        return "".join(f"    {line.rstrip()}\n" for line in deque(log, maxlen=_TAIL_LINES)).rstrip()
