"""A run on Flower's simulation that was cut short goes on to the same bits: its clients keep their state in the record.

Here without Flower's processes: a grid that is not ours carries the messages, and a restart is a grid of new contexts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from safetensors.torch import load_file

from fednorm.config import resolve
from fednorm.errors import RecordError
from fednorm.federation.client import make_client_app
from fednorm.federation.deployment.grid import AddressedGrid
from fednorm.federation.deployment.simulation import keeping_in
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.server import serve
from fednorm.federation.simulate import simulate
from fednorm.federation.simulate_flower import simulate_flower
from fednorm.federation.workbench import CLIENTS, workbench_of
from fednorm.records.record import RunRecord

VALUES: dict[str, Any] = {
    "data": {"domains": ["photo", "scans", "street"], "train_per_client": 12, "test_per_domain": 8},
    "model": {"width": 4},
    "strategy": {"name": "fedbn"},
    "train": {"batch_size": 6},
    "rounds": {"num_rounds": 4, "fraction": 0.7},
    "evaluate": {"kinds": ["own"], "diagnostics": False},
}


class Killed(BaseException):
    """What ends a server in a test."""


class Foreign(AddressedGrid):
    """A grid that is not :class:`InProcessGrid`, as far as the server sees."""

    def __init__(self, grid: Grid, hook: Callable[[Message], None]) -> None:
        super().__init__(grid)
        self.hook = hook

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        for message in messages:
            self.hook(message)
            yield from self._grid.send_and_receive([message], timeout=timeout)


def run(config: Any, runs: Path, hook: Callable[[Message], None] = lambda _: None) -> dict[str, Any]:
    """Serve a run to clients whose contexts are new."""
    bench, record = workbench_of(config), RunRecord(runs, config)
    bench.keeping = keeping_in(str(record.folder / CLIENTS))
    grid = InProcessGrid(make_client_app(lambda _: bench), len(bench.federation.clients), {})
    return serve(Foreign(grid, hook), bench, record, None)


def killing(phase: str, server_round: int, client: int) -> Callable[[Message], None]:
    seen: list[int] = []

    def hook(message: Message) -> None:
        config = message.content.config_records.get("config")
        if (message.metadata.message_type, config and config["server-round"]) == (phase, server_round):
            seen.append(message.metadata.dst_node_id)
            if len(seen) == client:
                raise Killed

    return hook


@pytest.mark.few(1)
@pytest.mark.parametrize(("strategy", "phase"), [("fedbn", "evaluate"), ("scaffold", "train"), ("ditto", "train")])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(strategy: str, phase: str, tmp_path: Path) -> None:
    config = resolve({**VALUES, "strategy": {"name": strategy}})
    with pytest.raises(Killed):
        run(config, tmp_path / "runs", killing(phase, 3, 2))
    assert len(RunRecord(tmp_path / "runs", config).lines()) == 2
    trained: list[int] = []
    again = run(config, tmp_path / "runs", lambda m: trained.append(m.metadata.dst_node_id) if is_train(m) else None)
    ours = simulate(config, runs=tmp_path / "ours")
    models = [load_file(Path(result["run"]) / "model.safetensors") for result in (again, ours)]
    assert all(torch.equal(tensor, models[1][key]) for key, tensor in models[0].items())
    assert again["final"]["per_domain"] == ours["final"]["per_domain"]
    assert len(trained) == 4, "two rounds of two clients were left"


STREAMS: dict[str, Any] = {
    "kind": "federated_continual",
    "seed": 26,
    "scenario": {"name": "split_digits", "num_experiences": 3, "train_per_experience": 45, "test_per_experience": 20},
    "model": {"width": 4},
    "norm": {"name": "batch_norm"},
    "strategy": {"name": "fedavg"},
    "learner": {"name": "lwf"},
    "grid": {"clients": 3, "norms": "per_experience"},
    "rounds": {"per_experience": 2, "fraction": 0.4},
    "train": {"batch_size": 8, "learning_rate": 0.05},
    "evaluate": {"task_identity": True},
}
"""Clients 0, 1, 0, 2, 1, 2 train: at every boundary two have not trained before it, and client 1 rests for a while."""


def at(kind: str, number: int) -> Callable[[Message], None]:
    """Return what kills a server before it sends a message of a kind, counted over the whole run from 1."""
    seen: list[int] = []

    def hook(message: Message) -> None:
        if message.metadata.message_type == kind:
            seen.append(message.metadata.dst_node_id)
            if len(seen) == number:
                raise Killed

    return hook


@pytest.mark.slow
def test_a_federation_of_streams_that_was_killed_again_and_again_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """Before a training, twice at a boundary that is then crossed anew, at the next one, and right after that."""
    config = resolve(STREAMS)
    ours = simulate(config, runs=tmp_path / "ours")
    ended = []
    for kind, number in [("train", 2), *[("query.boundary", 3)] * 2, ("query.boundary", 6), ("train", 2)]:
        with pytest.raises(Killed):
            run(config, tmp_path / "runs", at(kind, number))
        ended.append(len(RunRecord(tmp_path / "runs", config).lines()))
    again = run(config, tmp_path / "runs")
    models = [load_file(Path(result["run"]) / "model.safetensors") for result in (again, ours)]
    assert all(torch.equal(tensor, models[1][key]) for key, tensor in models[0].items())
    for key in ("accuracy_tensor", "own_accuracy_tensor", "temporal_forgetting"):
        assert again[key] == ours[key]
    shown, expected = (
        [{key: value for key, value in line.items() if key != "seconds"} for line in result["rounds"]]
        for result in (again, ours)
    )
    assert shown == expected, "no client has lost anything"
    assert ended == [1, 1, 1, 3, 4]


def is_train(message: Message) -> bool:
    return message.metadata.message_type == "train"


def test_what_a_client_keeps_is_in_the_record_and_nothing_where_it_keeps_nothing(tmp_path: Path) -> None:
    for strategy, count in (("fedbn", 3), ("fedavg", 0)):
        config = resolve({**VALUES, "strategy": {"name": strategy}, "rounds": {"num_rounds": 1}})
        run(config, tmp_path)
        files = list((RunRecord(tmp_path, config).folder / CLIENTS).rglob("*.safetensors"))
        assert len(files) == count


def test_such_a_checkpoint_is_not_one_of_this_process_s_clients(tmp_path: Path) -> None:
    config = resolve(VALUES)
    with pytest.raises(Killed):
        run(config, tmp_path, killing("train", 2, 1))
    with pytest.raises(RecordError, match=r"begun on Flower's runtime.*Go on with --runtime flower"):
        simulate(config, runs=tmp_path)


COMMAND = """
import json, sys
from pathlib import Path
from fednorm.config import resolve
from fednorm.federation.simulate_flower import simulate_flower
simulate_flower(resolve(json.loads(sys.argv[1])), runs=Path(sys.argv[2]), timeout=600)
"""


LONG = {**STREAMS, "strategy": {"name": "fedbn"}, "rounds": {"per_experience": 14}}
"""Enough rounds to be at it still when the signal comes; clients keep tensors and a learner's memory."""


@pytest.mark.flower
@pytest.mark.slow
def test_flower_s_own_simulation_goes_on_after_ctrl_c_and_is_one_process_s_alone(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Flower's simulation runtime needs ray")
    config = resolve(LONG)
    record = RunRecord(tmp_path / "runs", config)
    call = [sys.executable, "-c", COMMAND, json.dumps(config.to_dict()), str(tmp_path / "runs")]
    with subprocess.Popen(call, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        until = time.monotonic() + 300
        while not record.lines() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.1)
        with pytest.raises(RecordError, match="Another process is running this run"):
            simulate_flower(config, runs=tmp_path / "runs", timeout=600)
        process.send_signal(signal.SIGINT)
    assert processes_of(record.folder) == []
    ended = len(record.lines())
    assert 1 <= ended < 40
    result, ours = simulate_flower(config, runs=tmp_path / "runs", timeout=600), simulate(config, runs=tmp_path / "o")
    models = [load_file(Path(r["run"]) / "model.safetensors") for r in (result, ours)]
    assert all(torch.equal(tensor, models[1][key]) for key, tensor in models[0].items())
    assert result["final"]["per_domain"] == ours["final"]["per_domain"]
    assert not (record.folder / CLIENTS).exists()
    assert not (record.folder / "flower").exists()


def processes_of(folder: Path) -> list[str]:
    """Return the commands of all of this machine's processes whose ``FLWR_HOME`` is in a folder."""
    commands = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME", "").startswith(str(folder)):
                commands.append(" ".join(process.cmdline()))
    return commands
