"""Streams of toy data: the embedded digits, and tiny folders that look like other data sets."""

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
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 20, "mini_imagenet": 20}
DOMAINS = {  # of each split: its domains, of so many classes
    "core50": (("s01", "s02", "s11"), ("test",), 50),
    "clear10": (("bucket_01", "bucket_02"), ("bucket_01", "bucket_02"), 11),
}


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with random images, 8x8: three training images and two test images a class."""
    directory = tmp_path_factory.mktemp("data")
    for name, num_classes in CLASSES.items():
        for split, each in (("train", 3), ("test", 2)):
            write(directory / name / f"{split}-00000-of-00001.parquet", np.arange(each * num_classes) % num_classes)
    for name, (trained, tested, num_classes) in DOMAINS.items():
        for split, domains in (("train", trained), ("test", tested)):
            labels = np.arange(num_classes * len(domains)) % num_classes
            path = directory / name / f"{split}-00000-of-00001.parquet"
            write(path, labels, domain=np.repeat(domains, num_classes).tolist())
    return directory


def write(path: Path, labels: np.ndarray, column: str = "label", domain: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(labels))
    rows = []
    for array in rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"img": pa.array(rows, kind), column: pa.array(labels.tolist())}
    pq.write_table(pa.table(columns | ({"domain": pa.array(domain)} if domain else {})), path)


@pytest.fixture(scope="session")
def make(toy_folder: Path) -> Make:
    """Make a scenario's stream; what is made of one data set comes from the toy folder, all else from digits_mini."""

    def make_stream(name: str, seed: int = 1, *, data: dict[str, Any] | None = None, **options: Any) -> Stream:
        of = SCENARIOS[name].data[:1]
        folder = {"dir": str(toy_folder)} if of and of[0] in {*CLASSES, *DOMAINS} else {}
        config = DataConfig(**{**folder, **(data or {})})
        return SCENARIOS[name].stream(config, image_size=8, seed=seed, options=options)

    return make_stream


@pytest.fixture
def real_data() -> Path:
    """The folder of real data, or a skip."""
    path = Path(os.environ.get("FEDNORM_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
    if not path.is_dir():
        pytest.skip("no real data: set FEDNORM_DATA to its folder")
    return path.resolve()
