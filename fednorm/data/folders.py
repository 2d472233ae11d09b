"""Parquet folders in the Hugging Face layout: ``DIR/NAME/train-*.parquet`` and ``DIR/NAME/test-*.parquet``.

A file has an image column ``image`` or ``img`` (a struct whose ``bytes`` hold a whole PNG, JPEG or WebP file), an
integer label column ``label`` or ``fine_label``, and perhaps a column ``domain`` that cuts the folder into domains.
Class names are read from the schema's metadata where it has them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fednorm.data.cache import Pixels, cached, file_key
from fednorm.data.source import Rows, Source, stack
from fednorm.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
DOMAIN_COLUMN = "domain"
_BATCH_ROWS = 512


def list_folders(directory: Path) -> tuple[str, ...]:
    """Return the names of the Parquet folders that a directory holds, sorted."""
    if not directory.is_dir():
        return ()
    return tuple(sorted(path.name for path in directory.iterdir() if path.is_dir() and any(path.glob("*.parquet"))))


def read_folder(directory: Path, name: str, image_size: int, cache_dir: Path | None = None) -> Source:
    """Read one Parquet folder.

    Args:
        directory: The directory that holds the folder.
        name: The folder's name.
        image_size: S, the height and width to resize to.
        cache_dir: Where decoded arrays are kept (:func:`fednorm.data.cache.cache_folder`).

    Returns:
        The data set; its training images come first.

    Raises:
        DataError: The folder, a split, a shard or a column is missing; a file or an image is corrupt; a label is
            not an integer of the named classes. The message names the file and the row.
    """
    folder = directory / name
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. {directory} holds {_names(list_folders(directory))}.")
    shards = {split: _shards(folder, split) for split in ("train", "test")}
    paths = [*shards["train"], *shards["test"]]
    files = [_File(path) for path in paths]
    counts = [file.num_rows for file in files]
    class_names = next((file.class_names for file in files if file.class_names), ())
    labels = np.concatenate([file.labels(len(class_names)) for file in files])
    columns = [file.domains() for file in files]
    domains = (
        None if any(column is None for column in columns) else np.concatenate([c for c in columns if c is not None])
    )
    if domains is None and any(column is not None for column in columns):
        raise DataError(f"Some files of {folder} have a column {DOMAIN_COLUMN!r} and some have none; all or none must.")
    num_train = sum(counts[: len(shards["train"])])
    total = sum(counts)

    def decode() -> Pixels:
        return stack((image for file in files for image in file.images()), total, image_size)

    key = [f"image_size={image_size}", *(file_key(path) for path in paths)]
    return Source(
        name=name,
        images=cached(f"{name}-{image_size}", key, decode, cache_dir),
        labels=labels,
        train=np.arange(num_train, dtype=np.int64),
        test=np.arange(num_train, total, dtype=np.int64),
        files=tuple((str(path), count) for path, count in zip(paths, counts, strict=True)),
        class_names=class_names,
        domains=domains,
    )


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the files of one split in order, all of them or an error."""
    paths = sorted(folder.glob(f"{split}-*.parquet"))
    if not paths:
        there = sorted(path.name for path in folder.iterdir())
        raise DataError(f"{folder} has no {split} images: expected {split}-*.parquet, found {_names(there)}.")
    announced = re.search(r"-of-(\d+)\.parquet$", paths[0].name)
    if announced and int(announced[1]) != len(paths):
        raise DataError(
            f"{folder} is incomplete: {paths[0].name} announces {int(announced[1])} {split} files, "
            f"found {len(paths)}. Copy the missing ones."
        )
    return paths


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) if names else "nothing of that kind"


class _File:
    """One Parquet file; every error of reading it names it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            schema = pq.read_schema(path)
            self.num_rows = int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._broken(error) from error
        self.columns: list[str] = schema.names
        self.image_column = self._find(IMAGE_COLUMNS, "image")
        self.label_column = self._find(LABEL_COLUMNS, "label")
        kind = schema.field(self.image_column).type
        if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise DataError(
                f"{path}: column {self.image_column!r} must be a struct with a field 'bytes' that holds a whole "
                f"image file (Hugging Face's Image type); it is {kind}."
            )
        self.features = _features(schema.metadata)
        self.class_names = _class_names(self.features, self.label_column)

    def _find(self, candidates: tuple[str, ...], what: str) -> str:
        for name in candidates:
            if name in self.columns:
                return name
        raise DataError(
            f"{self.path} has no {what} column: expected {' or '.join(candidates)}, found {_names(self.columns)}."
        )

    def _broken(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path} cannot be read as a Parquet file ({str(error).splitlines()[0]}). It is corrupt or "
            "incomplete: copy it again."
        )

    def _column(self, name: str) -> Any:
        try:
            return pq.read_table(self.path, columns=[name]).column(0)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._broken(error) from error

    def labels(self, num_classes: int) -> Rows:
        """Return the labels, checked against the number of named classes (0: not named)."""
        column = self._column(self.label_column)
        if not pa.types.is_integer(column.type):
            raise DataError(
                f"{self.path}: column {self.label_column!r} must hold integers 0 to K - 1; it is {column.type}."
            )
        if column.null_count:
            row = next(row for row, value in enumerate(column) if not value.is_valid)
            raise DataError(f"{self.path}, row {row}: the label is missing. Remove the row or give it a label.")
        labels: Rows = column.to_numpy().astype(np.int64)
        outside = np.flatnonzero((labels < 0) | ((labels >= num_classes) & (num_classes > 0)))
        if len(outside):
            row = int(outside[0])
            highest = f"{num_classes - 1} (the metadata names {num_classes} classes)" if num_classes else "K - 1"
            raise DataError(f"{self.path}, row {row}: label {labels[row]} is outside 0 to {highest}.")
        return labels

    def domains(self) -> npt.NDArray[np.str_] | None:
        """Return each row's domain as text, or None where the file has no such column."""
        if DOMAIN_COLUMN not in self.columns:
            return None
        values = self._column(DOMAIN_COLUMN).to_pylist()
        names = _class_names(self.features, DOMAIN_COLUMN)
        for row, value in enumerate(values):
            if value is None or (names and not 0 <= value < len(names)):
                raise DataError(
                    f"{self.path}, row {row}: domain {value!r} is none of {_names(names) if names else 'a name'}."
                )
        return np.array([names[value] if names else str(value) for value in values], dtype=np.str_)

    def images(self) -> Iterator[Image.Image]:
        """Yield the images in order, decoded."""
        row = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(_BATCH_ROWS, columns=[self.image_column]):
                for content in batch.column(0).field("bytes").to_pylist():
                    yield self._decode(content, row)
                    row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise self._broken(error) from error

    def _decode(self, content: bytes | None, row: int) -> Image.Image:
        if content is None:
            raise DataError(
                f"{self.path}, row {row}: the image's bytes are missing. Embed the image files in the Parquet file "
                "(Hugging Face: `embed_external_files=True`)."
            )
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{self.path}, row {row}: the image cannot be decoded ({error}). Expected a whole PNG, JPEG or WebP "
                f"file of bytes; got {len(content)} bytes. Remove or replace the row."
            ) from error
        return image


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return the Hugging Face feature types in a schema's metadata, or nothing."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(features: dict[str, Any], column: str) -> tuple[str, ...]:
    feature = features.get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(str(name) for name in names) if isinstance(names, list) else ()
