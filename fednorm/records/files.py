"""Reading and writing files so that none is ever half there: whole ones take a place, and keep it in a power cut."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock


class HeldError(Exception):
    """Another process holds a lock."""


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock for this process; the system lets go of it when the process ends, however it does.

    Args:
        path: The lock's file, in a folder that exists.
        wait: Whether to wait until another process lets go of it.

    Raises:
        HeldError: Another process holds it, and ``wait`` is false.
        OSError: The file cannot be made.
    """
    lock = filelock.FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise HeldError(str(path)) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Give a file to write to, and put it in the place of another once it is whole and on the disk.

    Its mode is what the process's umask leaves, whoever writes it: safetensors alone would give the owner's only.

    Args:
        path: The file to be replaced or made.
        keep: What the replaced file is called from then on; None to lose it.

    Yields:
        A file beside it that exists, is empty, and is gone afterwards.

    Raises:
        OSError: The disk is full, or the file cannot be written; what was there before is whole.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # one left by a kill would lend its mode
        with part.open("wb"):
            mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        part.chmod(mode)
        sync(part)
        if keep is not None and path.exists():
            os.replace(path, keep)  # a kill at this point leaves the kept one, and no other
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Raises:
        OSError: The disk is full, or broken.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the file system can tell."""
    with suppress(OSError):
        sync(folder)


def append(path: Path, content: bytes) -> int:
    """Append to a file all or nothing, and return its size.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    with path.open("ab", buffering=0) as file:  # a buffer would be written again as the file is closed
        before = os.fstat(file.fileno()).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise
    return before + len(content)


def is_there(path: Path) -> bool:
    """Return whether a file exists.

    Raises:
        OSError: Its place cannot be looked at, or it is no regular file: a directory, or one that reading would wait
            for.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(mode):
        raise OSError(0, "it is a directory" if stat.S_ISDIR(mode) else "it is no regular file", str(path))
    return True


NO_FILE = (0, 0, 0)
"""The state of a file that is not there."""


def state(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to or replaced: its number, its size, and when it was changed.

    Raises:
        OSError: As :func:`is_there`.
    """
    if not is_there(path):
        return NO_FILE
    told = path.stat()
    return told.st_ino, told.st_size, told.st_mtime_ns


def read(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: There is none, or it cannot be read.
    """
    if not is_there(path):
        raise FileNotFoundError(0, "it is missing", str(path))
    return path.read_bytes()
