"""Runs of a few steps on every scenario, and a process that runs them in children which die where a test says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fednorm.config import merge
from fednorm.continual.simulate import simulate
from fednorm.continual.stream import Stream
from fednorm.continual.workbench import ContinualWorkbench
from fednorm.continual_config import ContinualConfig
from fednorm.models import model_spec
from fednorm.registry import resolve_continual, scenario_spec

Values = dict[str, Any]

LEARNER: dict[str, Values] = {
    "er": {"memory_size": 20},
    "er_ace": {"memory_size": 20},
    "derpp": {"memory_size": 20},
    "ewc": {"fisher_samples": 3, "strength": 0.1},
    "gdumb": {"memory_size": 20, "memory_epochs": 3},
}


def write_images(path: Path, num_classes: int, each: int) -> None:
    """Write random 8x8 images, as many of each class, in the columns of a data set of the hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num_classes + each)
    images = []
    for array in rng.integers(0, 256, (each * num_classes, 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    labels = [row % num_classes for row in range(each * num_classes)]
    pq.write_table(pa.table({"img": images, "label": labels}), path)


class Toy:
    """Runs that take some hundredths of a second: two experiences of 12 images, 8x8, in batches of 4 new ones.

    Args:
        folder: Where tiny look-alikes of CIFAR and decoded arrays are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._streams: dict[str, Stream] = {}
        for name, num_classes in (("cifar10", 10), ("cifar100", 100)):
            for split, each in (("train", 3), ("test", 2)):
                write_images(folder / name / f"{split}-00000-of-00001.parquet", num_classes, each)

    def values(self, scenario: str = "split_digits", learner: str = "naive", norm: str = "batch_norm") -> Values:
        """Return what a user would write for one of the runs."""
        small = {"train_per_experience": 12, "test_per_experience": 6, "num_experiences": 2}
        options = {key: small[key] for key in small if key in scenario_spec(scenario).options}
        own = {"name": learner, **LEARNER.get(learner, {})}
        if scenario == "split_cifar100" and "memory_size" in own:
            own["memory_size"] = 100  # room for every class
        return {
            "kind": "continual",
            "scenario": {"name": scenario, **options},
            "data": {
                "image_size": 8,
                "dir": str(self.folder) if "cifar" in scenario else "",
                "domains": ["scans", "photo"] if scenario == "domain_digits" else [],
            },
            "model": {"name": "digits_cnn", "width": 4},
            "norm": {"name": norm},
            "learner": own,
            "train": {"batch_size": 4, "epochs": 1},
            "evaluate": {"probe_images": 8},
        }

    def config(
        self, scenario: str = "split_digits", learner: str = "naive", norm: str = "batch_norm", /, **changes: Any
    ) -> ContinualConfig:
        """Return the configuration of one of the runs, some keys changed."""
        return resolve_continual(merge(self.values(scenario, learner, norm), changes))

    def bench(self, config: ContinualConfig) -> ContinualWorkbench:
        """Return a run's workbench; what has the same stream shares it."""
        plain = config.to_dict()
        key = json.dumps([plain["scenario"], plain["data"], config.seed, config.model.name])
        if key not in self._streams:
            self._streams[key] = scenario_spec(config.scenario.name).stream(
                config.data,
                image_size=model_spec(config.model.name).input_size,
                seed=config.seed,
                options=config.scenario.options,
                cache_dir=self.folder / "cache",
            )
        return ContinualWorkbench(config, self._streams[key])

    def run(self, config: ContinualConfig) -> tuple[dict[str, Any], ContinualWorkbench]:
        """Return the result of a run and the workbench that it has left."""
        bench = self.bench(config)
        return simulate(config, runs=None, bench=bench), bench

    @staticmethod
    def timeless(document: Any) -> Any:
        """Return a document without what depends on the time and the place of a run."""
        if isinstance(document, dict):
            return {k: Toy.timeless(v) for k, v in document.items() if k not in ("seconds", "run")}
        return [Toy.timeless(value) for value in document] if isinstance(document, list) else document

    @staticmethod
    def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
        """Return the keys of the tensors that differ in a single bit."""
        assert one.keys() == other.keys()
        return [key for key in one if one[key].numpy().tobytes() != other[key].numpy().tobytes()]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


# Processes that die ---------------------------------------------------------------------------------------------------

LAUNCHER = """
import json, os, resource, signal, sys
from pathlib import Path

import torch

import fednorm.study.record as record
from fednorm.continual.learner import Learner
from fednorm.continual.simulate import simulate
from fednorm.errors import FedNormError
from fednorm.registry import resolve_continual

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
    with (self.folder / "experiences.jsonl").open("a") as file:
        file.write(json.dumps(line)[:40])
    die()


class Watch:
    def __init__(self, where, n):
        self.where, self.n = where, n

    def begin(self, bench, first_step, total_steps):
        pass

    def step(self, done):
        if self.where == "after the step" and done == self.n:
            die()

    def experience(self, line):
        if line["experience"] == self.n:
            if self.where == "after the experience":
                die()
            if self.where == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.where == "disk full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


def arm(where, n):
    rec, checkpoints = record.RunRecord, []
    ended = lambda self, tensors, state: not state["progress"]["begun"] and state["experiences"] == n + 1
    if where == "in the step":
        before(Learner, "_train_on", lambda self, *_: self.progress.step + 1 == n, die)
    elif where == "in an update":
        before(Learner, "_backward_done", lambda self: self.progress.step == n, die)
    elif where == "before the line":
        before(rec, "append_line", lambda self, line: line["experience"] == n, die)
    elif where == "in the line":
        before(rec, "append_line", lambda self, line: line["experience"] == n, half_a_line)
    elif where == "before the checkpoint":
        before(rec, "save_state", ended, die)
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


simulate(resolve_continual(json.loads(sys.argv[1])), runs=None)  # imports and reads what all children need
print("ready", flush=True)
for request in map(json.loads, sys.stdin):
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            observer = arm(request["where"], request["n"])
            simulate(resolve_continual(request["values"]), runs=Path(request["runs"]), observer=observer)
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

    def __init__(self, values: Values) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self._read() == "ready\n"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def run(self, values: Values, runs: Path, where: str, n: int) -> tuple[int, int | str]:
        """Return a child's process id, and its exit code (negative for a signal) or ``stopped``."""
        assert self._process.stdin is not None
        request = {"values": values, "runs": str(runs), "where": where, "n": n}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        pid, how = json.loads(self._read())
        return pid, how

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def launcher(toy: Toy) -> Iterator[Launcher]:
    launcher = Launcher(toy.values())
    yield launcher
    launcher.close()


class Written:
    """What a finished run left on disk, without the time it took."""

    def __init__(self, folder: Path) -> None:
        assert not (folder / "checkpoint.safetensors").exists()
        assert not list(folder.glob("*.part"))
        self.model = load_file(folder / "model.safetensors")
        lines = (folder / "experiences.jsonl").read_text().splitlines()
        self.lines = Toy.timeless([json.loads(line) for line in lines])
        self.result = Toy.timeless(json.loads((folder / "result.json").read_text()))

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Written)
        assert not Toy.differing(self.model, other.model)
        assert self.lines == other.lines
        assert self.result == other.result
        return True


@pytest.fixture(scope="session")
def written() -> Callable[[Path], Written]:
    return Written
