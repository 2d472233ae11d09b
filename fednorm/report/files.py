"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fednorm.errors import RecordError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, in place of what is there, so that nobody ever reads half of it.

    The content goes to a file beside it, is put on the disk, and takes the name at once. Where that fails, what was
    there before is still there.

    Args:
        path: The file; its folder is made where it is not there.
        content: Bytes, or text that is written as UTF-8.

    Raises:
        RecordError: The file or its folder cannot be written.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(f"Cannot write {path}: {error.strerror or error}. Choose another place.") from error
