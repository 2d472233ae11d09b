"""Runs of a few steps on every scenario, and what their children may die of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fednorm.cards import MODELS, NORMS, SCENARIOS
from fednorm.config import RunConfig, merge, resolve
from fednorm.streams.simulate import simulate
from fednorm.streams.stream import Stream
from fednorm.streams.workbench import ContinualWorkbench

Values = dict[str, Any]

LEARNER: dict[str, Values] = {
    "er": {"memory_size": 20},
    "er_ace": {"memory_size": 20},
    "derpp": {"memory_size": 20},
    "ewc": {"fisher_samples": 3, "strength": 0.1},
    "gdumb": {"memory_size": 20, "memory_epochs": 3},
    "a_gem": {"memory_size": 20},
    "mir": {"memory_size": 20, "candidates": 6},
    "icarl": {"memory_size": 20},
    "scr": {"memory_size": 20, "projection": 8},
}


CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 20, "mini_imagenet": 20}
DOMAINS = {  # of each split: its domains, of so many classes
    "core50": ({"train": ("s01", "s02"), "test": ("test",)}, 50),
    "clear10": ({"train": ("bucket_01", "bucket_02"), "test": ("bucket_01", "bucket_02")}, 11),
}


def write_images(path: Path, num_classes: int, each: int, domains: Sequence[str] = ()) -> None:
    """Write random 8x8 images, as many of each class, of each domain, in the columns of a data set of the hub."""
    each *= len(domains) or 1
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num_classes + each)
    images = []
    for array in rng.integers(0, 256, (each * num_classes, 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    labels = [row % num_classes for row in range(each * num_classes)]
    of = {"domain": [domains[row // num_classes % len(domains)] for row in range(len(labels))]} if domains else {}
    pq.write_table(pa.table({"img": images, "label": labels, **of}), path)


class Toy:
    """Runs that take some hundredths of a second: two experiences of 12 images, 8x8, in batches of 4 new ones.

    Args:
        folder: Where tiny look-alikes of data sets and decoded arrays are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._streams: dict[str, Stream] = {}
        self._once: dict[str, tuple[dict[str, Any], ContinualWorkbench]] = {}
        for name, num_classes in CLASSES.items():
            for split, each in (("train", 3), ("test", 2)):
                write_images(folder / name / f"{split}-00000-of-00001.parquet", num_classes, each)
        for name, (splits, num_classes) in DOMAINS.items():
            for split, domains in splits.items():
                write_images(folder / name / f"{split}-00000-of-00001.parquet", num_classes, 1, domains)

    def values(self, scenario: str = "split_digits", learner: str = "naive", norm: str = "batch_norm") -> Values:
        """Return what a user would write for one of the runs."""
        small = {"train_per_experience": 12, "test_per_experience": 6, "num_experiences": 2}
        options = {key: small[key] for key in small if key in SCENARIOS[scenario].options}
        own = {"name": learner, **LEARNER.get(learner, {})}
        if scenario in ("split_cifar100", "split_core50", "domain_core50") and "memory_size" in own:
            own["memory_size"] = 100  # room for every class
        if norm == "task_balanced_norm" and learner == "derpp":
            own["memory_batch"] = 2  # two draws of them, as many as there are new samples
        return {
            "kind": "continual",
            "scenario": {"name": scenario, **options},
            "data": {
                "image_size": 8,
                "dir": str(self.folder) if {*SCENARIOS[scenario].data[:1]} & {*CLASSES, *DOMAINS} else "",
                "domains": ["scans", "photo"] if scenario == "domain_digits" else [],
            },
            "model": {"name": NORMS[norm].tried_on, "width": 16 if NORMS[norm].tried_on == "vit" else 4},
            "norm": {"name": norm},
            "learner": own,
            "train": {"batch_size": 4, "epochs": 1},
            "evaluate": {"probe_images": 8},
        }

    def config(
        self, scenario: str = "split_digits", learner: str = "naive", norm: str = "batch_norm", /, **changes: Any
    ) -> RunConfig:
        """Return the configuration of one of the runs, some keys changed."""
        return resolve(merge(self.values(scenario, learner, norm), changes))

    def bench(self, config: RunConfig) -> ContinualWorkbench:
        """Return a run's workbench; what has the same stream shares it."""
        plain = config.to_dict()
        key = json.dumps([plain["scenario"], plain["data"], config.seed, config.model.name])
        if key not in self._streams:
            self._streams[key] = SCENARIOS[config.scenario.name].stream(
                config.data,
                image_size=MODELS[config.model.name].input_size,
                seed=config.seed,
                options=config.scenario.options,
            )
        return ContinualWorkbench(config, self._streams[key])

    def run(self, config: RunConfig) -> tuple[dict[str, Any], ContinualWorkbench]:
        """Return the result of a run and the workbench that it has left."""
        bench = self.bench(config)
        return simulate(config, runs=None, bench=bench), bench

    def once(self, config: RunConfig) -> tuple[dict[str, Any], ContinualWorkbench]:
        """Return the result and the workbench of a run that others are compared with; it is made once."""
        if config.hash not in self._once:
            self._once[config.hash] = self.run(config)
        return self._once[config.hash]

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

KIND = """
from fednorm.streams.learner import Learner
from fednorm.streams.simulate import simulate
from fednorm.config import resolve

UNIT, ROOM = "experience", 10_000


def arm_own(where, n):
    if where == "in the step":
        before(Learner, "_train_on", lambda self, *_: self.progress.step + 1 == n, die)
    elif where == "in an update":
        before(Learner, "_backward_done", lambda self: self.progress.step == n, die)
    elif where == "before the checkpoint":
        ended = lambda self, checkpoint: not checkpoint.state["progress"]["begun"] and checkpoint.ended == n + 1
        before(record.RunRecord, "save_checkpoint", ended, die)
"""


@pytest.fixture(scope="session")
def launcher(launch: Any) -> Any:
    """Runs that die, besides, ``after the step`` n or in it, ``in an update``, ``before the checkpoint`` of an end."""
    return launch(KIND)


class Written:
    """What a finished run left on disk, without the time it took."""

    def __init__(self, folder: Path) -> None:
        assert not (folder / "checkpoint.safetensors").exists()
        assert not list(folder.glob("*.part"))
        self.model = load_file(folder / "model.safetensors")
        lines = (folder / "experiences.jsonl").read_text().splitlines()
        self.lines = [self._content(line) for line in lines]
        self.result = self._content((folder / "result.json").read_text())

    @staticmethod
    def _content(text: str) -> Any:
        """Return what a line or a result tells, without digests, which are of times too."""
        return Toy.timeless({key: value for key, value in json.loads(text).items() if key not in ("digest", "files")})

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Written)
        assert not Toy.differing(self.model, other.model)
        assert self.lines == other.lines
        assert self.result == other.result
        return True


@pytest.fixture(scope="session")
def written() -> Callable[[Path], Written]:
    return Written
