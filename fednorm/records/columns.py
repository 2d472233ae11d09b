"""What each client reported in a round, in columns: of a large federation a Parquet file a round beside the journal.

    clients/round-000012.parquet     round, phase (train or evaluate), client, domain, and every metric reported

A round's line then has, in place of a table a client, the file's name and the digest of its bytes. The file is whole
and on the disk before the line is. ``Result.clients()`` reads either form; so does anything that reads Parquet, all
rounds at once: ``polars.read_parquet("clients/*.parquet")``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fednorm.records.files as files
from fednorm.errors import RecordError
from fednorm.records.folder import Folder
from fednorm.records.integrity import DIGEST_BYTES, reason

if TYPE_CHECKING:
    import polars

COLUMNS = "clients"
"""The folder of the files; and what a round's line calls its clients."""

PHASES = ("train", "evaluate")

Reports = Mapping[str, Sequence[Mapping[str, Any]]]
"""A table for each client that reported, by phase."""


def in_columns(folder: Folder, line: Mapping[str, Any]) -> dict[str, Any]:
    """Write a line's clients to a file of columns, and return the line that names it.

    Args:
        folder: The record's folder.
        line: A round's line.

    Raises:
        RecordError: It cannot be written.
    """
    name, content = f"{COLUMNS}/round-{line['round']:06}.parquet", io.BytesIO()
    _frame(line["round"], line[COLUMNS]).write_parquet(content)
    with folder.writing(f"write {name}"):
        (folder.path / COLUMNS).mkdir(exist_ok=True)
    with folder.replacing(name) as part:
        part.write_bytes(content.getvalue())
    return {**line, COLUMNS: {"table": name, "digest": _digest(content.getvalue())}}


def reports(folder: Path, line: Mapping[str, Any]) -> Reports:
    """Return what clients reported, of a round's line of either form.

    Raises:
        RecordError: The file of columns is damaged or cannot be read.
    """
    clients: Mapping[str, Any] = line.get(COLUMNS, {})
    if "table" not in clients:
        return clients
    import polars

    frame = polars.read_parquet(io.BytesIO(content_of(folder, clients)))
    return {
        phase: [
            {key: value for key, value in row.items() if key not in ("round", "phase")}
            for row in frame.filter(polars.col("phase") == phase).to_dicts()
        ]
        for phase in PHASES
    }


def content_of(folder: Path, clients: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file of columns, as they were written.

    Args:
        folder: The record's folder.
        clients: What a round's line has of it.

    Raises:
        RecordError: It is missing, or something else.
    """
    path = folder / str(clients["table"])
    try:
        content = files.read(path)
        if _digest(content) != clients["digest"]:
            raise RecordError(f"{path} is not what was written there: its digest is another.")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {reason(error)}.") from error
    return content


def tables(lines: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield what lines have of files of columns."""
    return (line[COLUMNS] for line in lines if "table" in line.get(COLUMNS, {}))


def frame_of(folder: Path) -> polars.DataFrame:
    """Return what every client reported in every round of a record.

    Args:
        folder: The record's folder.

    Returns:
        A row a client, round and phase: ``round``, ``phase``, ``client``, ``domain`` and the metrics.

    Raises:
        RecordError: The record cannot be read.
    """
    import polars

    path = folder / "rounds.jsonl"
    try:
        lines = [json.loads(text) for text in files.read(path).decode("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {reason(error)}.") from error
    frames = [
        polars.read_parquet(io.BytesIO(content_of(folder, line[COLUMNS])))
        if "table" in line.get(COLUMNS, {})
        else _frame(line["round"], line.get(COLUMNS, {}))
        for line in lines
    ]
    return polars.concat(frames, how="diagonal_relaxed") if frames else polars.DataFrame()


def _frame(number: int, clients: Reports) -> polars.DataFrame:
    import polars

    head = {"round": polars.Int64, "phase": polars.String, "client": polars.Int64, "domain": polars.String}
    rows = [{"round": number, "phase": phase, **row} for phase in PHASES for row in clients.get(phase, ())]
    return polars.from_dicts(rows, infer_schema_length=None) if rows else polars.DataFrame(schema=head)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
