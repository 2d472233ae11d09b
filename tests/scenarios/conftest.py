"""Streams of toy data: the embedded digits, and tiny folders that look like CIFAR."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fednorm.cards import SCENARIOS
from fednorm.config import DataConfig
from fednorm.streams.stream import Stream

Make = Callable[..., Stream]
CLASSES = {"cifar10": 10, "cifar100": 100}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with random images, 8x8: three training images and two test images a class."""
    directory = tmp_path_factory.mktemp("data")
    for name, num_classes in CLASSES.items():
        for split, each in (("train", 3), ("test", 2)):
            write(directory / name / f"{split}-00000-of-00001.parquet", np.arange(each * num_classes) % num_classes)
    return directory


def write(path: Path, labels: np.ndarray, column: str = "label") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(labels))
    rows = []
    for array in rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(rows, kind), column: pa.array(labels.tolist())}), path)


@pytest.fixture(scope="session")
def make(cache: Path, toy_folder: Path) -> Make:
    """Make a scenario's stream; CIFAR comes from the toy folder, all else from ``digits_mini``."""

    def make_stream(name: str, seed: int = 1, *, data: dict[str, Any] | None = None, **options: Any) -> Stream:
        folder = {"dir": str(toy_folder)} if "cifar" in name else {}
        config = DataConfig(**{**folder, **(data or {})})
        return SCENARIOS[name].stream(config, image_size=8, seed=seed, options=options, cache_dir=cache)

    return make_stream


@pytest.fixture
def real_data() -> Path:
    """The folder of real data, or a skip."""
    path = Path(os.environ.get("FEDNORM_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
    if not path.is_dir():
        pytest.skip("no real data: set FEDNORM_DATA to its folder")
    return path.resolve()
