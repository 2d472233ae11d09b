"""Parquet folders written whole or not at all, in the layout of the Hugging Face Hub.

A preparation goes on in a hidden folder beside its place, ``DIR/.NAME.part``, under a lock: what a kill has left there
is thrown away by the next one, and nobody takes it for data, since its shards are called ``.parquet`` only at the end.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from PIL import Image

from fednorm.data.images import decode
from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Images, Row
from fednorm.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 256 << 20
"""Of images, after which a shard is full."""

GROUP_ROWS = 256
"""Rows of a group: what is in memory at a time."""

WHOLE = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"))
"""How a whole JPEG and a whole PNG file begin and end; what begins or ends otherwise is decoded, to see what it is."""

RECIPE = "prepared.json"
"""What is written beside the shards: from which archives they were made, and what was decided."""


@dataclass(frozen=True)
class Written:
    """A Parquet folder that was written.

    Attributes:
        folder: Where it is.
        train: Training images.
        test: Test images.
        classes: K.
        domains: Images of each domain, training and test; empty for one without a column of domains.
        notes: What was decided where nothing official is known.
    """

    folder: Path
    train: int
    test: int
    classes: int
    domains: dict[str, tuple[int, int]]
    notes: tuple[str, ...]


@contextmanager
def staging(directory: Path, name: str, folders: Sequence[str]) -> Iterator[Path]:
    """Give a hidden folder to write to; the folders that are then in it take their place in ``directory`` together.

    Args:
        directory: The folder of data sets; made where it is not there.
        name: The recipe's.
        folders: The names of the folders that will be there.

    Yields:
        The hidden folder; it is gone afterwards.

    Raises:
        DataError: One of the folders is there, another process is at it, or the disk refuses.
    """
    hidden = directory / f".{name}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _require_free(directory, folders)
        lock = filelock.FileLock(directory / f".{name}.lock", timeout=0)
        with lock:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            try:
                yield hidden
                _require_free(directory, folders)
                _take_place(hidden, directory, folders)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
                with suppress(OSError):
                    Path(lock.lock_file).unlink()
    except filelock.Timeout as error:
        raise DataError(f"Another process is preparing {name} in {directory}. Wait for it.") from error
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"Cannot write to {directory}: {error.strerror or error}. Nothing half-made was kept. Make room, or choose "
            "another folder."
        ) from error


def _require_free(directory: Path, folders: Sequence[str]) -> None:
    for name in folders:
        if os.path.lexists(directory / name):
            raise DataError(
                f"{directory / name} is there already, and nothing is written over. Remove it to prepare it anew, or "
                "choose another folder."
            )


def _take_place(hidden: Path, directory: Path, folders: Sequence[str]) -> None:
    """Move the folders to their place, all of them or none."""
    moved = []
    try:
        for name in folders:
            if (hidden / name).is_dir():
                os.replace(hidden / name, directory / name)
                moved.append(name)
    except BaseException:
        for name in moved:
            shutil.rmtree(directory / name, ignore_errors=True)
        raise


def write_images(
    images: Images, files: Files, parent: Path, about: dict[str, Any], step: Callable[[int], None] | None = None
) -> Written:
    """Write a Parquet folder.

    Args:
        images: What it holds.
        files: Where the images' files are.
        parent: The folder that it is made in.
        about: What :data:`RECIPE` says besides the numbers.
        step: Is told of images as they are written.

    Raises:
        DataError: A split has no image, a label is none of the classes, or a file cannot be read.
        OSError: The disk refuses.
    """
    folder = parent / images.name
    folder.mkdir()
    writers: dict[str, _Shards] = {}
    domains: Counter[tuple[str, str]] = Counter()
    try:
        for row in images.rows:
            if not 0 <= row.label < len(images.class_names):
                raise DataError(f"{images.name}: label {row.label} is outside 0 to {len(images.class_names) - 1}.")
            if row.split not in writers:
                writers[row.split] = _Shards(folder, row.split, images.class_names, with_domains=bool(row.domain))
            writers[row.split].add(row, files)
            domains[row.domain, row.split] += 1
            if step is not None:
                step(1)
    finally:
        for writer in writers.values():
            writer.close()
    for split in ("train", "test"):
        if split not in writers:
            raise DataError(f"{files.place}: {images.name} would have no {split} images. Is the archive whole?")
    for writer in writers.values():
        writer.name_all()
    names = sorted({domain for domain, _ in domains if domain})
    written = Written(
        folder,
        sum(count for (_, split), count in domains.items() if split == "train"),
        sum(count for (_, split), count in domains.items() if split == "test"),
        len(images.class_names),
        {name: (domains[name, "train"], domains[name, "test"]) for name in names},
        images.notes,
    )
    said = {**about, "train": written.train, "test": written.test, "domains": written.domains, "notes": images.notes}
    (folder / RECIPE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return written


class _Shards:
    """The shards of a split, one open at a time."""

    def __init__(self, folder: Path, split: str, class_names: Sequence[str], *, with_domains: bool) -> None:
        self.folder, self.split = folder, split
        self.schema = _schema(class_names, with_domains=with_domains)
        self.paths: list[Path] = []
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0
        self.writer: Any = None

    def add(self, row: Row, files: Files) -> None:
        """Write an image, or keep it until there are enough of them."""
        content, path = _content(row, files)
        entry: dict[str, Any] = {"image": {"bytes": content, "path": path}, "label": row.label}
        if bool(row.domain) != ("domain" in self.schema.names):
            raise DataError(f"{self.folder.name}: some images have a domain and some have none.")
        if row.domain:
            entry["domain"] = row.domain
        self.rows.append(entry)
        self.bytes += len(content)
        if len(self.rows) >= GROUP_ROWS:
            self._flush()
        if self.bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Finish the shard that is open."""
        try:
            self._flush()
        finally:
            if self.writer is not None:
                writer, self.writer, self.bytes = self.writer, None, 0
                writer.close()

    def name_all(self) -> None:
        """Give the shards the names by which they are recognized, now that their number is known."""
        for number, path in enumerate(self.paths):
            path.rename(self.folder / f"{self.split}-{number:05d}-of-{len(self.paths):05d}.parquet")

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, self.rows = self.rows, []
        if not rows:
            return
        if self.writer is None:
            path = self.folder / f"{self.split}-{len(self.paths)}.part"
            self.writer = pq.ParquetWriter(path, self.schema, compression="none")  # images are compressed
            self.paths.append(path)
        self.writer.write_table(pa.Table.from_pylist(rows, schema=self.schema))


def _schema(class_names: Sequence[str], *, with_domains: bool) -> pa.Schema:
    """Return the columns as ``datasets`` writes them: it names the classes in the schema's metadata."""
    import pyarrow as pa

    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
    ]
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    if with_domains:
        fields.append(pa.field("domain", pa.string()))
        features["domain"] = {"dtype": "string", "_type": "Value"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _content(row: Row, files: Files) -> tuple[bytes, str]:
    """Return an image's file, and its name; pixels become a PNG file."""
    if isinstance(row.image, str):
        content = files.read(row.image)
        if not any(content.startswith(first) and content.endswith(last) for first, last in WHOLE):
            decode(content, f"{files.place}: {row.image}")
        return content, row.image.rpartition("/")[2]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(row.image)).save(buffer, "PNG")
    return buffer.getvalue(), ""
