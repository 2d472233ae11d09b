"""Sites on real nodes of Flower's, on loopback, with TLS and registered keys: what travels, and what becomes of faults.

One SuperLink and its nodes serve all tests of this file, on one worker (``--dist loadfile``), in their order. Every
process is ended by its id. What the nodes say passes through a relay that ends TLS with the SuperLink's own certificate
and writes it down. Flower's processes begin with ``tests/support/quick_flower``, which makes them wait less, and lets a
test hold up what a node is asked: no test hopes to be quicker than a node. The fault table of docs/how-to/deploy.md is
made of what these tests have seen; with ``FEDNORM_RECORD=1`` they write it down.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fednorm.config import resolve
from fednorm.data.federation import load_site
from fednorm.errors import AggregationError
from fednorm.federation.deployment.folder import Deployment, write_deployment
from fednorm.federation.deployment.loopback import Loopback, copy_to
from fednorm.federation.deployment.sent import read_sent
from fednorm.federation.deployment.submit import deploy
from fednorm.federation.processes import free_port, own_processes
from fednorm.federation.simulate import simulate

pytestmark = [pytest.mark.deployment, pytest.mark.slow]

SITES = ("siteA", "siteB", "siteC")
OTHER = "siteD"
"""A site with a class more."""

RECORD = Path(__file__).resolve().parents[2] / "docs/how-to/deploy-faults.json"

QUICK = Path(__file__).resolve().parents[1] / "support/quick_flower"
"""What Flower's processes begin with."""


class Relay:
    """A TLS server in front of the SuperLink that passes everything on, and writes it down."""

    def __init__(self, folder: Path, upstream: int) -> None:
        self.port, self.said = free_port(), {"up": bytearray(), "down": bytearray()}
        self._upstream = upstream
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(folder / "certificates/server.pem", folder / "certificates/server.key")
        self._client = ssl.create_default_context(cafile=str(folder / "certificates/ca.crt"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        serve = asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._server)
        server = self._loop.run_until_complete(serve)
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up = await asyncio.open_connection("127.0.0.1", self._upstream, ssl=self._client)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pass(reader, up[1], "up"), self._pass(up[0], writer, "down"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        try:
            while data := await reader.read(65536):
                self.said[way] += data
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


class Clinic(Loopback):
    """The running folder, and what is done to its nodes."""

    scripts: dict[str, subprocess.Popen[bytes]]
    data: Path
    relay: Relay
    seconds: list[float]
    """What each round of the first run took."""

    def up(self, *names: str) -> None:
        """Start nodes, and wait until they are there."""
        before = {name: self.count(name, "SuperNode ID") for name in names}
        for name in names:
            self.scripts[name] = self.start(name)
        for name in names:
            self.wait(lambda name=name: self.count(name, "SuperNode ID") > before[name], f"{name} is up")

    def ready(self) -> None:
        """Start the nodes of sites that are not running, and hold up nothing."""
        self.go_on()
        self.up(*(name for name in SITES if name not in self.scripts or self.scripts[name].poll() is not None))

    def go_on(self) -> None:
        """Hold up nothing any more."""
        for path in self.folder.glob("flower/*/hold.*"):
            path.unlink(missing_ok=True)

    def hold(self, name: str, kind: str, server_round: int) -> Callable[[], None]:
        """Let a node wait before it does what it is asked in a round; return what lets it go on."""
        path = self.folder / "flower" / name / f"hold.{kind}.{server_round}"
        path.touch()
        return lambda: path.unlink(missing_ok=True)

    def kill(self, name: str) -> None:
        """Kill a script and all that it has started, without a word."""
        script = psutil.Process(self.scripts[name].pid)
        script.suspend()  # it starts nothing more
        for process in [script, *script.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                process.kill()
        self.scripts[name].wait(10)

    def count(self, name: str, text: str) -> int:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace").count(text) if path.exists() else 0

    def wait(self, come: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not come():
            assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
            time.sleep(0.05)

    def run(self, *acts: Callable[[], None], **sections: Any) -> dict[str, Any]:
        """Run a federation; meanwhile another thread does what is to be done, one thing after the other."""
        errors: list[BaseException] = []

        def play() -> None:
            try:
                for act in acts:
                    act()
            except BaseException as error:
                errors.append(error)
                self.go_on()

        player = threading.Thread(target=play, daemon=True)
        player.start()
        try:
            result = deploy(run_of(**sections), self.superlink, runs=self.folder / "runs", timeout=900)
        finally:
            player.join(60)
            assert not errors, errors
        assert result is not None
        return result

    def says(self, name: str, what: str, times: int = 1) -> Callable[[], None]:
        """Return an act that waits for a node to say something so many times from now on."""
        until = self.count(name, what) + times
        return lambda: self.wait(lambda: self.count(name, what) >= until, f"{name} says {what!r} {times} times")

    def ended(self, count: int, **sections: Any) -> Callable[[], None]:
        """Return an act that waits for a run to have so many rounds in its record."""
        config = run_of(**sections)

        def lines() -> int:
            found = list((self.folder / "runs").glob(f"*{config.hash}*/rounds.jsonl"))
            return found[0].read_text().count("\n") if found else 0

        return lambda: self.wait(lambda: lines() >= count, f"{count} rounds")


def values_of(seed: int = 1, rounds: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "strategy": {"name": "fedbn"},
        "data": {"name": "image_folders", "domains": list(SITES)},
        "model": {"width": 4},
        "train": {"batch_size": 6},
        "evaluate": {"diagnostics": False},
        "rounds": {"num_rounds": 3, "wait": 180.0, "timeout": 300.0, "min_answered": 0.0} | (rounds or {}),
        **sections,
    }


def run_of(**sections: Any) -> Any:
    return resolve(values_of(**sections))


def draw_images(folder: Path) -> None:
    draw = np.random.default_rng(3)
    for site in (*SITES, OTHER):
        for name in ("cat", "dog", "owl")[: 3 if site == OTHER else 2]:
            (folder / site / name).mkdir(parents=True)
            for number in range(10):
                pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / site / name / f"{number}.png")


@contextmanager
def in_memory() -> Iterator[str]:
    """Give a folder for the SuperLink's database, in memory where there can be: on a busy disk it is locked."""
    place = Path("/dev/shm")
    with TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield folder


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    if shutil.which("openssl") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("keys and certificates need OpenSSL and OpenSSH")
    scratch = tmp_path_factory.mktemp("nodes")
    made, copy, port = scratch / "made", scratch / "copy", free_port()
    assert write_deployment(made, Deployment((*SITES, OTHER))) == []
    draw_images(made / "data")
    copy_to(copy, made, (*SITES, OTHER), port)
    with in_memory() as memory, Relay(copy, port) as relay, own_processes(scratch) as (tree, environment):
        environment["PYTHONPATH"] = f"{QUICK}{os.pathsep}{environment['PYTHONPATH']}"
        for name in (*SITES, OTHER):
            script = copy / f"{name}.sh"
            text = re.sub(r"(?<=--superlink )\S+", f"127.0.0.1:{relay.port}", script.read_text())
            script.write_text(re.sub(r"sleep \d+ &", "sleep 1 &", text))
        for script in copy.glob("*.sh"):  # what looks for work takes its time: every look is a connection
            text = re.sub(r"(?<=POLL_INTERVAL=)\S+", "0.2", script.read_text())
            script.write_text(text.replace("$FLWR_HOME/state.db", f"{memory}/state.db"))
        running = Clinic(copy, port, tree, environment)
        running.scripts, running.data, running.relay, running.seconds = {}, made / "data", relay, [0.0]
        running.scripts["superlink"] = running.start_server()
        running.register()
        yield running
    left = tree.refresh()
    assert not left, f"processes were left: {left}"


# The table ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = []


def row(done: str, *seen: str) -> None:
    """Take down what was done to nodes, and what the run's record says of it."""
    ROWS.append({"done": done, "seen": list(seen)})


def events(result: dict[str, Any], site: str) -> list[str]:
    return [e["event"] for line in result["rounds"] for e in line.get("events", ()) if e["site"] == site]


def rejected(result: dict[str, Any], number: int, client: int) -> list[str]:
    line = result["rounds"][number - 1]
    return list(dict.fromkeys(r["reason"] for r in line["rejected"] if r["client"] == client))


def trained(result: dict[str, Any]) -> list[set[int]]:
    """Return whose training each round has used."""
    lines = (Path(result["run"]) / "rounds.jsonl").read_text().splitlines()
    return [{client["client"] for client in json.loads(line)["clients"]["train"]} for line in lines]


def model(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["run"]) / "model.safetensors")


def in_process(clinic: Clinic, tmp_path: Path, **sections: Any) -> dict[str, Any]:
    data = {"name": "image_folders", "domains": list(SITES), "dir": str(clinic.data)}
    return simulate(run_of(**{**sections, "data": data}), runs=tmp_path)


def kept(clinic: Clinic, site: str, config: Any) -> dict[str, torch.Tensor]:
    """Return the local tensors that a site keeps on its disk for a run."""
    (path,) = (clinic.folder / "state" / site).glob(f"{config.hash}-*/{site}.safetensors")
    return {k.partition("/")[2]: t for k, t in load_file(path).items() if k.startswith("fednorm.local/")}


# The tests, in their order --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(clinic: Clinic) -> dict[str, Any]:
    """A run in which nothing happens."""
    clinic.ready()
    result = clinic.run()
    clinic.seconds = [line["seconds"] for line in result["rounds"]]
    return result


def test_three_sites_end_with_the_bits_of_one_process(first: dict[str, Any], clinic: Clinic, tmp_path: Path) -> None:
    ours = in_process(clinic, tmp_path)
    assert model(first).keys() == model(ours).keys()
    assert all(tensor.equal(model(first)[key]) for key, tensor in model(ours).items())
    assert first["final"]["per_domain"] == ours["final"]["per_domain"]
    assert (first["rejected_updates"], [events(first, site) for site in SITES]) == (0, [[], [], []])
    assert clinic.listening() == {"127.0.0.1"}


def test_no_image_no_label_and_no_local_tensor_is_on_the_wire(first: dict[str, Any], clinic: Clinic) -> None:
    """Bytes are searched for in what the nodes and the SuperLink have said, TLS taken off."""
    config, said = run_of(), bytes(clinic.relay.said["up"] + clinic.relay.said["down"])
    shared = model(first).values()
    assert all(tensor.numpy().tobytes() in said for tensor in shared), "what is shared is found there"
    for site in SITES:
        local = [t for t in kept(clinic, site, config).values() if t.is_floating_point() and len(t.unique()) > 2]
        assert len(local) > 8
        assert not any(tensor.numpy().tobytes() in said for tensor in local)
        own = load_site(config.data, site, str(clinic.data / site), image_size=28, seed=1).clients[0]
        for split in (own.train, own.test):
            images, labels = split.inputs(torch.arange(len(split)))
            raw = [split.images[i] for i in split.index]
            assert not any(image.contiguous().numpy().tobytes()[:256] in said for image in [*raw, *images])
            assert labels.numpy().tobytes() not in said
        for path in (clinic.data / site).rglob("*.png"):
            assert path.read_bytes()[-60:-12] not in said


@pytest.mark.usefixtures("first")
def test_what_was_on_the_wire_is_what_the_sites_wrote_down(clinic: Clinic) -> None:
    said = bytes(clinic.relay.said["up"])
    for site in SITES:
        sent = read_sent(clinic.folder / "sent" / f"{site}.jsonl")
        assert {kind: of_kind.count for kind, of_kind in sent.items()} == {
            "query.describe": 1, "train": 3, "evaluate": 3
        }  # fmt: skip
        keys = {key.partition("/")[2] for key in sent["train"].tensors}
        assert keys
        assert not keys & kept(clinic, site, run_of()).keys()
        assert all(key.encode() in said for key in keys)
        assert not sent["query.describe"].tensors
        assert not sent["evaluate"].tensors


TRAIN, EVALUATE = "Receiving: train message", "Receiving: evaluate message"

FAULTY: dict[str, Any] = {"seed": 2, "rounds": {"num_rounds": 4, "evaluate_every": 4}}


@pytest.fixture(scope="module")
def faulty(clinic: Clinic) -> dict[str, Any]:
    """A run of which nodes are killed between rounds, in training and in evaluation; the first two are started again.

    In round 3, which one node trains in alone, it is held up until they are back.
    """
    clinic.ready()
    trains, goes_on = clinic.hold("siteB", "train", 2), clinic.hold("siteC", "train", 3)
    scores = clinic.hold("siteC", "evaluate", 4)
    return clinic.run(
        clinic.ended(1, **FAULTY),
        lambda: clinic.kill("siteA"),
        clinic.says("siteB", TRAIN, 2),
        lambda: clinic.kill("siteB"),
        trains,
        clinic.says("siteC", TRAIN, 3),
        lambda: clinic.up("siteA", "siteB"),
        goes_on,
        clinic.says("siteC", EVALUATE),
        lambda: clinic.kill("siteC"),
        scores,
        **FAULTY,
    )


def test_a_node_killed_in_training_costs_its_own_update(faulty: dict[str, Any]) -> None:
    (reason,) = rejected(faulty, 2, 1)
    row("a node is killed in training", f"siteB: {reason}")
    assert trained(faulty) == [{0, 1, 2}, {2}, {2}, {0, 1, 2}]


def test_a_node_killed_between_rounds_costs_its_own_update(faulty: dict[str, Any]) -> None:
    (reason,) = rejected(faulty, 2, 0)
    row("a node is killed between two rounds", f"siteA: {reason}")


def test_killed_nodes_that_are_started_again_go_on_with_their_state(faulty: dict[str, Any], clinic: Clinic) -> None:
    back = {site: events(faulty, site) for site in SITES}
    assert back["siteA"] == back["siteB"] == ["its node has left", "its node has come back"]
    for client, site in enumerate(SITES):
        tensors = kept(clinic, site, run_of(**FAULTY))
        (steps,) = {int(tensor) for key, tensor in tensors.items() if "num_batches" in key}
        assert steps == 3 * sum(client in clients for clients in trained(faulty)), (
            "every batch of the rounds that were used"
        )
    comes = [f"{site}: {'; '.join(back[site])}" for site in SITES[:2]]
    row("both are started again", *comes, "each goes on with the local tensors that it had on its disk")


def test_a_node_killed_in_evaluation_is_missing_from_it(faulty: dict[str, Any]) -> None:
    assert faulty["final"]["missing"] == {"clients": [2], "domains": ["siteC"]}
    assert sorted(faulty["final"]["per_domain"]) == ["siteA", "siteB"]
    (reason,) = rejected(faulty, 4, 2)
    row("a node is killed in evaluation", f"siteC: {reason}", "the result says that siteC is missing from it")


CUT: dict[str, Any] = {"seed": 3, "rounds": {"num_rounds": 3, "evaluate_every": 3}}

HEARS = """
import runpy, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, [])
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "fednorm"
runpy.run_module("fednorm", run_name="__main__")
"""
"""The command, deaf to no signal, whatever whoever started the tests was."""


@pytest.fixture(scope="module")
def cut(clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[str, Any]]:
    """A run that is interrupted in round 2, and loses its SuperLink in round 3: how the first command ended, and it."""
    clinic.ready()
    ended = interrupted(clinic, tmp_path_factory.mktemp("cut") / "run.toml")
    with pytest.raises(AggregationError, match="did not complete"):
        clinic.run(clinic.ended(2, **CUT), lambda: clinic.kill("superlink"), **CUT)
    clinic.scripts["superlink"] = clinic.start_server()
    return *ended, clinic.run(**CUT)


def interrupted(clinic: Clinic, path: Path) -> tuple[int, str]:
    """Hand in a run by its command and interrupt that in round 2; return its exit code and what it has said."""
    tables = {name: table for name, table in values_of(**CUT).items() if isinstance(table, dict)}
    lines = [f"seed = {CUT['seed']}"]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n")
    arguments = ["--config", str(path), "--runtime", "deployment", "--runs", str(clinic.folder / "runs")]
    link = ["--superlink", clinic.superlink.address, "--root-certificates", str(clinic.superlink.root_certificates)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    call, said = [sys.executable, "-c", HEARS, "federated", *arguments, *link], list[str]()
    goes_on = clinic.hold("siteA", "train", 2)
    with subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        reader = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
        reader.start()

        def shows(what: str) -> bool:
            assert process.poll() is None, "".join(said)
            return any(what in line for line in said)

        clinic.wait(lambda: shows("round 1:"), "the command shows round 1")
        process.send_signal(signal.SIGINT)
        process.wait(240)
        reader.join(10)
    goes_on()
    return process.returncode, " ".join("".join(said).split())


def test_a_killed_superlink_s_run_goes_on_from_the_last_round(
    cut: tuple[int, str, dict[str, Any]], clinic: Clinic, tmp_path: Path
) -> None:
    result, ours = cut[2], in_process(clinic, tmp_path, **CUT)
    assert all(tensor.equal(model(result)[key]) for key, tensor in model(ours).items())
    assert result["final"]["per_domain"] == ours["final"]["per_domain"]
    assert trained(result) == [{0, 1, 2}] * 3
    row("the SuperLink is killed, and started again", "the same command goes on from the last round, to the same bits")


@pytest.mark.usefixtures("first")
def test_strangers_and_slow_nodes_hold_nobody_up(clinic: Clinic) -> None:
    """A node is slow in round 1, and hangs from its training in round 3 on: it says that it is alive, and no more."""
    clinic.ready()
    timeout = round(max(10.0, *(2.5 * seconds for seconds in clinic.seconds)))  # this machine may have much else to do
    sections: dict[str, Any] = {
        "seed": 4,
        "data": {"name": "image_folders"},
        "rounds": {"num_rounds": 3, "timeout": float(timeout), "min_nodes": 3, "evaluate_every": 3},
    }
    strangers(clinic)
    goes_on = clinic.hold("siteB", "train", 1)
    clinic.hold("siteB", "train", 3)

    def quicken() -> None:
        time.sleep(timeout + 1)
        goes_on()

    result = clinic.run(clinic.says("siteB", TRAIN), quicken, **sections)
    (reason,) = rejected(result, 1, 1)
    assert f"no reply came within {timeout} s" in reason
    reason = reason.replace(f"{timeout} s", "… s")
    late = dict.fromkeys(events(result, "siteB"))  # where much else is to do, the next round's may be late too
    row("a node is slower than rounds.timeout", f"siteB: {reason}", *(f"siteB: {event}" for event in late))
    silent, spent = rejected(result, 3, 1)
    assert silent.replace(f"{timeout} s", "… s") == reason
    row("a node hangs in training, and says that it is alive", f"siteB: {reason}", f"siteB: {spent}")
    (difference,) = events(result, OTHER)
    assert difference.startswith("refused: it has 3 classes (cat, dog, owl), and site")
    row("a site has other classes", f"siteD: {re.sub('and site.', 'and siteA', difference)}")
    assert trained(result)[0] == trained(result)[2] == {0, 2}
    assert {"siteA", "siteC"} == set(result["final"]["per_domain"])


def test_ctrl_c_stops_the_run_on_the_superlink(cut: tuple[int, str, dict[str, Any]]) -> None:
    code, said, result = cut
    assert code == 130, said
    assert re.search(r"stopped\. Run \d+ on the SuperLink at 127\.0\.0\.1:\d+ was stopped\.", said)
    assert re.search(r"Finished and whole: 1 of 3 rounds, in .* Run the same command again to go on", said)
    assert [line["round"] for line in result["rounds"]] == [1, 2, 3]
    row("the launcher is interrupted (Ctrl-C)", "the run is stopped on the SuperLink; the same command goes on")


def strangers(clinic: Clinic) -> None:
    """Start a node of other classes; one with a key that nobody has registered and one without any are refused."""
    clinic.scripts[OTHER] = clinic.start(OTHER)
    key, text = clinic.folder / "keys/stranger", (clinic.folder / "siteA.sh").read_text()
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    port = re.search(r"--port (\d+)", text)
    assert port
    for name, change in {
        "stranger": lambda script: script.replace("keys/siteA", "keys/stranger"),
        "nameless": lambda script: re.sub(r"--auth-supernode-private-key \S+", "", script),
    }.items():
        script = change(text.replace("flower/siteA", f"flower/{name}").replace(port[0], f"--port {free_port()}"))
        (clinic.folder / f"{name}.sh").write_text(script)
        clinic.scripts[name] = clinic.start(name)
    refusals = {
        "stranger": "[code: 2004] Failed to activate SuperNode.",
        "nameless": "[code: 2001] SuperNode authentication is enabled. All SuperNodes must be registered via the CLI.",
    }
    for name, refusal in refusals.items():
        clinic.wait(lambda name=name, refusal=refusal: clinic.count(name, refusal) > 0, f"{name} is refused")
        assert not clinic.count(name, "SuperNode ID")
        clinic.kill(name)
    clinic.wait(lambda: clinic.count(OTHER, "SuperNode ID") > 0, f"{OTHER} is up")
    row("a node has a key that nobody has registered", f"the SuperLink refuses it: {refusals['stranger']}")
    row("a node has no key", f"the SuperLink refuses it: {refusals['nameless']}")


def test_the_table_of_the_documentation_is_what_happened() -> None:
    if len(ROWS) < len(json.loads(RECORD.read_text(encoding="utf-8"))):
        pytest.skip("the other tests of this file have not all run")
    if os.environ.get("FEDNORM_RECORD"):
        RECORD.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(RECORD.read_text(encoding="utf-8")) == ROWS
