"""What a run must not leave behind: a folder of a run that never began, a checkpoint beside a finished result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRACES = (".lock", ".launch", ".writable", "run.json", "clients.sqlite", "clients.sqlite-journal")
"""Files of a record that say nothing of how its run went."""


def not_there(folder: Path) -> list[Path]:
    """Return a folder and those that hold it, as far as they do not exist yet, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        with suppress(OSError):  # e.g. a name that is too long
            if path.exists():
                break
        missing.append(path)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def nothing_left(folder: Path, missing: list[Path], lines: str, stands: Callable[[], bool]) -> Iterator[None]:
    """Take a record away again when a block fails before anything of its run stands: a refused run leaves nothing.

    Args:
        folder: The record's folder.
        missing: What :func:`not_there` said before it was made.
        lines: The name of the file that grows while the run goes.
        stands: Says whether there is something to keep.
    """
    try:
        yield
    except BaseException:
        if not stands():
            remove_traces(folder, missing, lines)
        raise


def remove_traces(folder: Path, missing: list[Path], lines: str) -> None:
    """Remove a record of which nothing stands; whatever else lies in its folder keeps the folder.

    Args:
        folder: The record's folder.
        missing: The folders that were made for it.
        lines: The name of the file that grows while a run goes.
    """
    with suppress(OSError):
        for path in (folder / lines, *(folder / name for name in TRACES), *folder.glob("*.part")):
            if path.is_file():
                path.unlink()
        shutil.rmtree(folder / "clients", ignore_errors=True)
        remove_empty([folder, *missing])


def anything_stands(lines: Path, *whole: Path) -> bool:
    """Return whether anything of a run is worth keeping: a line, or one of the files that are written whole."""
    return any(path.exists() for path in whole) or (lines.exists() and (lines.is_dir() or lines.stat().st_size > 0))


def beside_a_result(folder: Path, *checkpoints: Path) -> None:
    """Remove what a process that died just after writing its result has left beside it; a folder to read stays."""
    with suppress(OSError):
        for path in (*checkpoints, *folder.glob("*.part")):
            path.unlink(missing_ok=True)
