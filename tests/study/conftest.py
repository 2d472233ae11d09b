"""Small runs, and a process that runs them in children which die where a test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fednorm.config import RunConfig, merge
from fednorm.registry import resolve_config

SMALL: dict[str, Any] = {
    "data": {"train_per_client": 24, "test_per_domain": 10},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "rounds": {"num_rounds": 4},
}

LAUNCHER = """
import json, os, resource, signal, sys
from pathlib import Path

import torch

import fednorm.federated.client as client
import fednorm.study.record as record
from fednorm.errors import FedNormError
from fednorm.federated.simulate import simulate
from fednorm.registry import resolve_config

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
    with (self.folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(line)[:40])
    die()


class Watch:
    def __init__(self, where, n):
        self.where, self.n = where, n

    def begin(self, bench, first_round):
        pass

    def round(self, line):
        if line["round"] == self.n:
            if self.where == "after the round":
                die()
            if self.where == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.where == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def arm(where, n):
    rec, checkpoints = record.RunRecord, []
    if where == "in a client's training":
        when = lambda bench, who, server_round, **_: server_round == n and who.partition_id == 3
        before(client, "fit", when, die)
    elif where == "before the line":
        before(rec, "append_line", lambda self, line: line["round"] == n, die)
    elif where == "in the line":
        before(rec, "append_line", lambda self, line: line["round"] == n, half_a_line)
    elif where == "before the checkpoint":
        before(rec, "save_checkpoint", lambda self, checkpoint: checkpoint.server_round == n, die)
    elif where == "in the checkpoint":
        def nth(part, name):
            checkpoints.extend([1] if str(name).endswith("checkpoint.safetensors") else [])
            return len(checkpoints) == n
        before(record.os, "replace", nth, die)
    elif where == "before the result":
        before(rec, "finish", lambda *_: True, die)
    elif where == "in the result":
        before(record.os, "replace", lambda part, name: str(name).endswith("result.json"), die)
    return Watch(where, n)


config = resolve_config(json.loads(sys.argv[1]))
simulate(config, runs=None)  # imports and reads what all children need
print("ready", flush=True)
for request in map(json.loads, sys.stdin):
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            observer = arm(request["where"], request["round"])
            simulate(resolve_config(request["values"]), runs=Path(request["runs"]), observer=observer)
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
    """Runs configurations in child processes of its own, which end where and when they are told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, json.dumps(SMALL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self._read() == "ready\n"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def run(self, values: dict[str, Any], runs: Path, where: str, server_round: int) -> tuple[int, int | str]:
        """Return a child's process id, and its exit code (negative for a signal) or ``stopped``."""
        request = {"values": values, "runs": str(runs), "where": where, "round": server_round}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        pid, how = json.loads(self._read())
        return pid, how

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def small() -> Callable[..., dict[str, Any]]:
    """Make the values of a small run: FedBN for four rounds, some keys changed."""

    def values(**changes: Any) -> dict[str, Any]:
        return merge(SMALL, changes)

    return values


@pytest.fixture
def make(small: Callable[..., dict[str, Any]]) -> Callable[..., RunConfig]:
    return lambda **changes: resolve_config(small(**changes))


class Written:
    """What a finished run left on disk, without the time it took."""

    def __init__(self, folder: Path) -> None:
        self.model = load_file(folder / "model.safetensors")
        clients = folder / "clients.safetensors"
        self.clients = load_file(clients) if clients.exists() else {}
        assert not (folder / "checkpoint.safetensors").exists()
        lines = map(json.loads, (folder / "rounds.jsonl").read_text().splitlines())
        self.rounds = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
        result = json.loads((folder / "result.json").read_text())
        self.result = {key: value for key, value in result.items() if key not in ("seconds", "run", "rounds")}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Written)
        for mine, theirs in ((self.model, other.model), (self.clients, other.clients)):
            assert mine.keys() == theirs.keys()
            different = [key for key in mine if mine[key].numpy().tobytes() != theirs[key].numpy().tobytes()]
            assert not different
        assert self.rounds == other.rounds
        assert self.result == other.result
        return True


@pytest.fixture(scope="session")
def written() -> type[Written]:
    return Written
