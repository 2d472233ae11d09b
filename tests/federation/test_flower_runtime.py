"""Flower's own simulation runtime, started for real where the marker says so, in an environment set against it."""

import http.server
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fednorm.errors import AggregationError, ConfigError
from fednorm.federation import flower_private, flower_runtime, processes
from fednorm.federation.flower_runtime import FlowerRun, run_with_flower, write_app

AWKWARD = json.dumps({"it's": 'a "quoted" \\ = [x] # no\n\t\x7f é😀', "list": [1, 2.5, None, True]}, ensure_ascii=False)

TOY_APP = """
import json, os, time
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@server.main()
def main(grid, context):
    print("server", os.getpid(), flush=True)
    if context.run_config["mode"] == "fail":
        raise ValueError("toy failure 4711")
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.05)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    replies = [dict(reply.content["seen"]) for reply in grid.send_and_receive(messages)]
    with open(context.run_config["out"], "w") as out:
        json.dump({"config": dict(context.run_config), "replies": replies}, out)
    print("replied", flush=True)
    while context.run_config["mode"] == "hang":
        time.sleep(0.1)

@client.query()
def query(message, context):
    seen = MetricRecord({"pid": os.getpid(), "partition": int(context.node_config["partition-id"])})
    return Message(RecordDict({"seen": seen}), reply_to=message)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy app outside any package, importable here; returns its folder and its configuration."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "toy_flower_app.py").write_text(TOY_APP)
    monkeypatch.syspath_prepend(str(modules))
    config = {"mode": "", "out": str(tmp_path / "out.json"), "text": "", "count": 3, "rate": 1.0, "flag": True}
    return write_app(tmp_path / "app", "toy_flower_app:server", "toy_flower_app:client", config)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What must not capture a run: a server on Flower's local port, another Ray, a dead proxy, a PATH without flwr."""
    asked: list[str] = []

    class Decoy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Decoy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT"):
        monkeypatch.setenv(name, str(server.server_port))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    yield asked
    server.shutdown()
    server.server_close()


class Witness:
    """Notes, line by line, which processes a launch has started and on which ports they listen."""

    def __init__(self, parent: psutil.Process | None = None, on_line: Callable[[str], None] | None = None) -> None:
        self.parent = parent or psutil.Process()
        # Other tests of this process may have left it a child, e.g. a browser, which starts more by itself.
        self.strangers = set() if parent else {child.pid for child in self.parent.children(recursive=True)}
        self.lines: list[str] = []
        self.processes: dict[int, tuple[psutil.Process, str]] = {}
        self.ports: set[int] = set()
        self.addresses: set[str] = set()
        self.ray_folders: set[str] = set()
        self.on_line = on_line

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.look()
        if self.on_line is not None:
            self.on_line(line)

    def look(self) -> None:
        for process in self.parent.children(recursive=True):
            try:
                if self.strangers & {process.pid, *(above.pid for above in process.parents())}:
                    continue
                self.processes[process.pid] = (process, " ".join(process.cmdline()))
                self.ray_folders.add(process.environ().get("RAY_TMPDIR", ""))
                connections = process.net_connections(kind="tcp")
            except psutil.Error:
                continue
            listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
            self.ports |= {address.port for address in listening}
            self.addresses |= {address.ip for address in listening}

    def assert_nothing_left(self, home: Path, *expected: str) -> None:
        commands = [command for _, command in self.processes.values()]
        for word in expected:
            assert any(word in command for command in commands), f"no process with {word} was ever seen: {commands}"
        assert processes_of(home) == []
        left = [command for process, command in self.processes.values() if processes.is_alive(process)]
        assert left == []
        assert self.ray_folders - {""}
        assert not any(Path(folder).exists() for folder in self.ray_folders - {""})
        assert self.ports
        # A killed process gives its sockets back when its last thread has ended, a moment after its first.
        deadline = time.monotonic() + 2
        while (served := [port for port in self.ports if is_served(port)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert served == []


def is_served(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_of(home: Path) -> list[str]:
    """All processes of the machine, descendants or not, that carry a launch's FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home / "flwr"):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.flower
@pytest.mark.slow
def test_a_run_completes_in_a_hostile_environment_and_leaves_nothing(
    toy: Path, tmp_path: Path, hostile: list[str]
) -> None:
    witness = Witness()
    overrides = {"mode": "ok", "text": AWKWARD, "count": -7, "rate": 0.1, "flag": False}
    run = run_with_flower(
        toy, num_supernodes=3, run_config=overrides, home=tmp_path / "home", timeout=120, on_line=witness
    )
    assert (run.status, run.exit_code) == ("finished:completed", 0)
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["config"] == overrides | {"out": str(tmp_path / "out.json")}
    assert type(out["config"]["flag"]) is bool
    assert {reply["partition"] for reply in out["replies"]} == {0, 1, 2}
    assert len({reply["pid"] for reply in out["replies"]}) <= len(os.sched_getaffinity(0))
    assert run.log_path.read_text().splitlines() == witness.lines
    assert f"Successfully started run {run.run_id}" in witness.lines
    assert not any("\x1b" in line for line in witness.lines)
    assert hostile == [], "the run spoke to the SuperLink of another checkout"
    assert witness.addresses, "nobody was seen to listen"
    assert witness.addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, "somebody listens to the whole network"
    witness.assert_nothing_left(
        tmp_path / "home", "flower-superlink", "flower-superexec", "flwr-simulation", "raylet", "gcs_server"
    )


@pytest.mark.flower
@pytest.mark.slow
def test_a_failed_run_is_an_error_that_quotes_the_cause(toy: Path, tmp_path: Path) -> None:
    witness = Witness()
    with pytest.raises(AggregationError, match="finished:failed") as caught:
        run_with_flower(
            toy, num_supernodes=3, run_config={"mode": "fail"}, home=tmp_path / "home", timeout=120, on_line=witness
        )
    reason, _, tail = str(caught.value).partition("\n")
    assert "toy failure 4711" in reason
    assert "ValueError: toy failure 4711" in tail
    assert str(tmp_path / "home" / "flower.log") in tail
    witness.assert_nothing_left(tmp_path / "home", "flower-superlink", "flwr-simulation")


def test_a_run_that_outlasts_its_time_says_so_and_ends(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Flower: what stands for its SuperLink and for its client sleeps."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho up\nexec sleep 60\n")
    sleeper.chmod(0o755)
    started: list[psutil.Process] = []

    def start(tree: processes.ProcessTree, _: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        process = tree.start([str(sleeper)], environment, stdout=subprocess.DEVNULL)
        started.append(psutil.Process(process.pid))
        return process

    monkeypatch.setattr(flower_runtime, "_start_superlink", start)
    monkeypatch.setattr(flower_runtime, "command_of", lambda _: str(sleeper))
    witness = Witness()
    with pytest.raises(AggregationError, match=r"time was up(.|\n)*    up"):
        run_with_flower(toy, num_supernodes=3, run_config={}, home=tmp_path / "home", timeout=1, on_line=witness)
    assert [process for process, _ in witness.processes.values() if processes.is_alive(process)] == []
    assert [process for process in started if processes.is_alive(process)] == []


@pytest.mark.flower
@pytest.mark.slow
def test_a_terminated_launcher_ends_all_it_started(toy: Path, tmp_path: Path) -> None:
    """The other signals are raised as this one is (``tests/cli/test_signals.py``)."""
    number = signal.SIGHUP
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        sys.path[:] = {sys.path!r}
        from fednorm.federation.flower_runtime import run_with_flower
        run_with_flower(Path({str(toy)!r}), num_supernodes=3, run_config={{"mode": "hang"}}, timeout=120,
                        home=Path({str(tmp_path / "home")!r}), on_line=lambda line: print(line, flush=True))
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as launcher:
        witness = Witness(psutil.Process(launcher.pid))
        for line in launcher.stdout:
            witness(line.strip())
            if line.startswith("server "):
                launcher.send_signal(number)
                launcher.send_signal(number)  # a closed terminal tells a process twice
        assert launcher.wait(30) == 128 + number
    witness.assert_nothing_left(tmp_path / "home", "flower-superlink", "flwr-simulation")


BINDS = """#!{python}
import socket, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
server = socket.create_server(("127.0.0.1", port))
time.sleep(60)
"""


def test_a_port_taken_meanwhile_is_not_mistaken_for_our_superlink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Flower: what stands for its SuperLink listens where it is told, or ends."""
    command = tmp_path / "superlink"
    command.write_text(BINDS.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setattr(flower_runtime, "command_of", lambda _: str(command))
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        free = processes.free_port
        offers = iter([stranger.getsockname()[1]])
        monkeypatch.setattr(flower_runtime, "free_port", lambda: next(offers, None) or free())
        with processes.own_processes(tmp_path) as (tree, environment):
            own = flower_runtime._start_superlink(tree, tmp_path, environment)
            address = tomllib.loads((tmp_path / "flwr" / "config.toml").read_text())["superlink"]["own"]["address"]
            assert address != f"127.0.0.1:{stranger.getsockname()[1]}"
            assert next(offers, None) is None
            assert tree.listens(own, int(address.rpartition(":")[2]))


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] != "0":
    subprocess.Popen([sys.executable, __file__, str(int(sys.argv[1]) - 1)], start_new_session=True)
print("up", flush=True)
if sys.argv[1] == "1":
    time.sleep(1.5); sys.exit()
time.sleep(60)
"""


@pytest.mark.slow
def test_a_tree_ends_deaf_and_orphaned_descendants_but_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "POLITE_SECONDS", 0.3)
    program = tmp_path / "family.py"
    program.write_text(FAMILY)
    tree = processes.ProcessTree()
    with subprocess.Popen([sys.executable, program, "0"], stdout=subprocess.DEVNULL) as stranger:
        try:
            tree.start([sys.executable, str(program), "2"], os.environ, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 10
            while len(family := tree.refresh()) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(family) == 3
            while len(tree.refresh()) == 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            tree.end()
            assert [process for process in family if processes.is_alive(process)] == []
            assert stranger.poll() is None
        finally:
            stranger.kill()


text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.one_of(text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats())


@given(config=st.dictionaries(text, values, max_size=5))
def test_written_configurations_read_back_the_same(
    config: dict[str, str | bool | int | float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_app(tmp_path_factory.getbasetemp() / "roundtrip", "a.b:server", "a.b:client", config)
    app = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "a.b:server", "clientapp": "a.b:client"}
    assert app["config"].keys() == config.keys()
    for key, value in config.items():
        read = app["config"][key]
        assert type(read) is type(value)
        assert read == value or (math.isnan(read) and math.isnan(value))


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, 2**63])
def test_a_value_flower_cannot_hold_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds is .*JSON"):
        write_app(tmp_path / "app", "a:b", "a:c", {"rounds": value})


def test_an_app_is_never_written_over_a_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ConfigError, match=r"another pyproject\.toml"):
        write_app(tmp_path, "a:b", "a:c", {})
    assert (tmp_path / "pyproject.toml").read_text() == "[project]\n"
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="already holds data"):
        write_app(tmp_path, "a:b", "a:c", {})


def request(app: Path, tmp_path: Path, **changes: Any) -> FlowerRun:
    arguments = {"num_supernodes": 3, "run_config": {}, "home": tmp_path / "home", "timeout": 1} | changes
    return run_with_flower(app, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_config": {"nope": 1}}, r"count, flag, mode, out, rate, text, not nope"),
        ({"num_supernodes": 0}, r"num_supernodes must be at least 1, got 0"),
        ({"client_cpus": 10**6}, r"client_cpus must be between 1 and this machine's \d+ cores, got 1000000"),
    ],
)
def test_requests_that_cannot_run_are_refused_before_anything_starts(
    changes: dict[str, Any], message: str, toy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        request(toy, tmp_path, **changes)
    assert not (tmp_path / "home").exists()


def test_a_home_inside_the_app_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which Flower packs"):
        request(toy, tmp_path, home=toy / "home")


def test_a_missing_ray_names_the_extra(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(flower_runtime.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'fednorm\[simulation\]'.*pip install 'flwr\[simulation\]'"):
        request(toy, tmp_path)


@pytest.fixture
def no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    monkeypatch.setattr(flower_private, "_set_by_us", None)


def message() -> Message:
    return Message(RecordDict(), dst_node_id=5, message_type="train")


@pytest.mark.usefixtures("no_identity")
def test_messages_can_be_built_with_an_identity_and_only_then() -> None:
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        message()
    flower_private.ensure_task_identity(run_id=11, node_id=1, task_id=3)
    metadata = message().metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (11, 1, 3)
    flower_private.ensure_task_identity(run_id=12, node_id=1, task_id=4)
    assert message().metadata.run_id == 12


@pytest.mark.usefixtures("no_identity")
def test_an_identity_that_flower_has_set_is_kept() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 99, 1, 7
    flower_private.ensure_task_identity(run_id=11, node_id=2, task_id=3)
    assert message().metadata.run_id == 99


def test_a_flower_without_identities_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.supercore.task_identity", None)
    monkeypatch.setattr(flower_private, "_set_by_us", None)
    flower_private.ensure_task_identity(run_id=11, node_id=1, task_id=3)
    assert flower_private._set_by_us is None


def test_an_empty_run_carries_its_number() -> None:
    run = flower_private.empty_run(17)
    assert (run.run_id, run.override_config, type(run).__name__) == (17, {}, "Run")


def test_flowers_log_is_quiet_within_the_block_only(logged: Any) -> None:
    logger = logging.getLogger("flwr")
    before = logger.level
    with flower_private.quiet_flower_log():
        logger.info("hidden")
        logger.warning("shown")
    assert logger.level == before
    logger.info("shown again")
    assert list(dict.fromkeys(logged.messages)) == ["shown", "shown again"]
