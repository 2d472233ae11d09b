"""Parquet folders in the Hugging Face layouts: ``DIR/NAME/train-*.parquet`` and ``DIR/NAME/test-*.parquet``.

:mod:`fednorm.data.shards` says which files are a split's; :mod:`fednorm.data.columns` reads what a file holds: an image
column, a label column and perhaps a column ``domain`` that cuts the folder into domains. Here they become one data set.
Names decide what a label means: a file that numbers the same class names in another order is numbered anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fednorm.data.cache import Pixels, cached, file_key
from fednorm.data.classes import Rows, in_natural_order, renumbered, require_same_names, some
from fednorm.data.shards import DOMAIN_COLUMN, entries, find_shards, holds_parquet
from fednorm.data.source import Source, stack
from fednorm.errors import DataError

if TYPE_CHECKING:
    from fednorm.data.columns import ImageTable


def list_folders(directory: Path) -> tuple[str, ...]:
    """Return the names of the Parquet folders that a directory holds, sorted."""
    if not directory.is_dir():
        return ()
    return tuple(path.name for path in entries(directory) if path.is_dir() and holds_parquet(path))


def read_folder(directory: Path, name: str, image_size: int, cache_dir: Path | None = None) -> Source:
    """Read one Parquet folder.

    Args:
        directory: The directory that holds the folder.
        name: The folder's name.
        image_size: S, the height and width to resize to.
        cache_dir: Where decoded arrays are kept (:func:`fednorm.data.cache.cache_folder`).

    Returns:
        The data set; its training images come first. Labels are numbered as the first file that names its classes
        does (the training files come first), or, where labels are texts, in their natural order.

    Raises:
        DataError: The folder, a split, a shard or a column is missing or there twice; a file or an image is corrupt
            or refused; a label is not one of the classes; files name different classes; the images do not fit into
            memory. The message names the file and the row.
    """
    # Imports pyarrow, which starts a thread of its own: worker processes are forked off one that has no other.
    from fednorm.data.columns import ImageTable

    folder = directory / name
    if not folder.is_dir():
        there = some(list_folders(directory)) or "nothing of that kind"
        raise DataError(f"There is no folder {folder}. {directory} holds {there}.")
    shards = find_shards(folder)
    paths = [*shards.train, *shards.test]
    tables = [ImageTable(path) for path in paths]
    counts = [table.num_rows for table in tables]
    num_train, total = sum(counts[: len(shards.train)]), sum(counts)
    for split, count, split_paths in (("training", num_train, shards.train), ("test", total - num_train, shards.test)):
        if not count:
            raise DataError(f"{folder} has no {split} images: {some([p.name for p in split_paths])} hold no rows.")
    labels, class_names = _classes(tables, len(shards.train))

    def decode() -> Pixels:
        return stack((image for table in tables for image in table.images()), total, image_size)

    key = [f"image_size={image_size}", *(file_key(path) for path in paths)]
    return Source(
        name=name,
        images=cached(f"{name}-{image_size}", key, decode, cache_dir, shape=(total, 3, image_size, image_size)),
        labels=labels,
        train=np.arange(num_train, dtype=np.int64),
        test=np.arange(num_train, total, dtype=np.int64),
        files=tuple((str(path), count) for path, count in zip(paths, counts, strict=True)),
        class_names=class_names,
        domains=_domains(folder, tables),
        note=shards.note,
    )


def _classes(tables: Sequence[ImageTable], num_train_files: int) -> tuple[Rows, tuple[str, ...]]:
    """Return every row's label, numbered by one list of class names, and that list, empty where there are no names."""
    columns = [table.labels() for table in tables]
    stated = next((table for table in tables if table.class_names), None)
    if stated is not None:
        reference, there = stated.class_names, f"the metadata of {stated.path}"
    else:
        train = [names for _, names in columns[:num_train_files]]
        reference, there = in_natural_order(name for names in train for name in names), "the training files"
    parts = []
    for table, (labels, names) in zip(tables, columns, strict=True):
        if table.class_names:
            require_same_names(names, str(table.path), reference, there)
        elif reference or names:
            _require_known(table, labels, names, reference, there)
        parts.append(renumbered(labels, names, reference))
    return np.concatenate(parts), reference


def _require_known(table: ImageTable, labels: Rows, names: Sequence[str], reference: Sequence[str], there: str) -> None:
    """Check a file without class names in its metadata, beside one that has names: its labels must be such names."""
    if not names and len(labels):
        raise DataError(
            f"{table.path} gives no class names, and {there} do: which class its label {labels[0]} is, is not said. "
            "Write the same Hugging Face metadata into every file."
        )
    unknown = [k for k, name in enumerate(names) if name not in set(reference)]
    if unknown:
        row = int(np.flatnonzero(labels == unknown[0])[0])
        raise DataError(
            f"{table.path}, row {row}: label {names[unknown[0]]!r} is none of the classes of {there}: "
            f"{some(reference)}."
        )


def _domains(folder: Path, tables: Sequence[ImageTable]) -> npt.NDArray[np.str_] | None:
    columns = [table.domains() for table in tables]
    present = [column for column in columns if column is not None]
    if not present:
        return None
    if len(present) < len(columns):
        raise DataError(f"Some files of {folder} have a column {DOMAIN_COLUMN!r} and some have none; all or none must.")
    return np.concatenate(present)
