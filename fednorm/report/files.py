"""Exports written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fednorm.errors import RecordError
from fednorm.records.files import replacing


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file in place of what is there, so that nobody ever reads half of it.

    Args:
        path: The file; its folder is made where it is not there.
        content: Bytes, or text that is written as UTF-8.

    Raises:
        RecordError: The file or its folder cannot be written; what was there before is still there.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(data)
    except OSError as error:
        raise RecordError(f"Cannot write {path}: {error.strerror or error}. Choose another place.") from error
