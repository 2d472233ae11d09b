"""Tiny Parquet folders in the Hugging Face layout."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

WriteFile = Callable[..., Path]
WriteFolder = Callable[..., Path]


def encode(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the tests out of the user's cache."""
    path = tmp_path / "cache"
    monkeypatch.setenv("FEDNORM_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests may share which only read the embedded digits: drawing them takes seconds."""
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture
def write_file() -> WriteFile:
    def write(
        path: Path,
        images: Sequence[Any],
        labels: Sequence[Any],
        *,
        image: str = "image",
        label: str = "label",
        names: Sequence[str] | None = None,
        domain: Sequence[Any] | None = None,
        domain_names: Sequence[str] | None = None,
        form: str = "PNG",
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"bytes": encode(x, form) if isinstance(x, np.ndarray) else x, "path": None} for x in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns: dict[str, Any] = {image: pa.array(rows, kind), label: pa.array(labels)}
        features: dict[str, Any] = {image: {"_type": "Image"}, label: {"dtype": "int64", "_type": "Value"}}
        if names is not None:
            features[label] = {"names": list(names), "_type": "ClassLabel"}
        if domain is not None:
            columns["domain"] = pa.array(domain)
            features["domain"] = {"names": list(domain_names), "_type": "ClassLabel"} if domain_names else {}
        table = pa.table(columns)
        meta = json.dumps({"info": {"features": features}}).encode()
        pq.write_table(table.replace_schema_metadata({b"huggingface": meta}), path)
        return path

    return write


@pytest.fixture
def write_folder(write_file: WriteFile) -> WriteFolder:
    """Write a folder of random 8x8 images, one training and one test file."""

    def write(
        directory: Path, name: str, num_train: int = 20, num_test: int = 10, num_classes: int = 2, **kwargs: Any
    ) -> Path:
        rng = np.random.default_rng(len(name))
        for split, count in (("train", num_train), ("test", num_test)):
            images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
            labels = (np.arange(count) % num_classes).tolist()
            extra = {key: value[:count] if key == "domain" else value for key, value in kwargs.items()}
            write_file(directory / name / f"{split}-00000-of-00001.parquet", list(images), labels, **extra)
        return directory / name

    return write


@pytest.fixture
def real_data() -> Path:
    """The folder of real data, or a skip."""
    path = Path(os.environ.get("FEDNORM_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
    if not path.is_dir():
        pytest.skip("no real data: set FEDNORM_DATA to its folder")
    return path.resolve()
