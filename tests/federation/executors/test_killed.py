"""A run with workers that a signal ends leaves no process and no memory behind, and goes on to the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone"),
]

COMMAND = """
import sys
from pathlib import Path
from fednorm.bench.case import Case
from fednorm.config import resolve
from fednorm.federation.executors.sequential import Sequential
from fednorm.federation.executors.workers import Workers
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.signals import raising

count, folder = int(sys.argv[1]), Path(sys.argv[2])
case = Case(name="", clients=6, train=12, test=4, image_size=8, width=4, batch_size=4, rounds=1)
values = {"strategy": {"name": "fedbn"}, "model": {"width": 4}, "rounds": {"num_rounds": 12}}
values |= {"train": {"batch_size": 4, "momentum": 0.9, "reset_optimizer": False}}
bench = Workbench(resolve(values), case.federation())
with raising():
    executor = Workers(bench, count) if count > 1 else Sequential(bench)
    simulate(bench.config, runs=folder, bench=bench, executor=lambda _: executor)
"""


class Run:
    """The run, in a session of its own."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder
        command = [sys.executable, "-c", COMMAND, str(count), str(folder)]
        self.process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    def rounds(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("*/rounds.jsonl"))

    def wait_for(self, rounds: int) -> None:
        until = time.monotonic() + 120
        while self.rounds() < rounds and self.process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)

    def members(self) -> list[int]:
        """Return the processes of the session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def require_nothing_left(self) -> None:
        until = time.monotonic() + 10
        while self.members() and time.monotonic() < until:
            time.sleep(0.02)
        assert self.members() == []

    def tensors(self) -> dict[str, torch.Tensor]:
        assert self.process.wait(240) == 0
        files = [*self.folder.glob("*/model.safetensors"), *self.folder.glob("*/clients.safetensors")]
        assert len(files) == 2
        return {f"{file.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def require_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    memory = set(os.listdir("/dev/shm"))
    run = Run(tmp_path)
    run.wait_for(2)
    assert len(run.members()) == 3
    run.process.send_signal(number)
    assert run.process.wait(60) != 0
    run.require_nothing_left()
    assert set(os.listdir("/dev/shm")) <= memory


def test_a_signal_to_all_processes_of_a_terminal_leaves_nothing_behind(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.wait_for(2)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(60) != 0
    run.require_nothing_left()


def test_killed_runs_and_killed_workers_go_on_to_the_same_bits(tmp_path: Path) -> None:
    draw = random.Random(7)
    whole = Run(tmp_path / "whole", count=1).tensors()
    for number in range(4):
        folder = tmp_path / str(number)
        run = Run(folder)
        run.wait_for(draw.randrange(1, 6))
        time.sleep(0.1 * draw.random())
        worker = draw.choice([pid for pid in run.members() if pid != run.process.pid] or [run.process.pid])
        os.kill(worker, signal.SIGKILL)
        run.wait_for(draw.randrange(6, 11))
        run.process.kill()
        run.process.wait()
        run.require_nothing_left()
        require_same(Run(folder, count=1 + number % 3).tensors(), whole)
