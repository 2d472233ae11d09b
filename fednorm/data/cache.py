"""Decoded images on disk: one memory-mapped ``.npy`` file a data set and image size.

Decoding 70,000 PNG files takes ten seconds, mapping the decoded array takes none, and processes that map the same
file share its pages. The cache is an optimisation and nothing else: where it cannot be read or written, the images
are decoded again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

FORMAT_VERSION = 2
"""Part of every key: raise it when the same files come to mean other arrays."""

log = logging.getLogger(__name__)


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Return where decoded arrays are kept.

    Args:
        cache_dir: The caller's choice.

    Returns:
        ``cache_dir``, else ``$FEDNORM_CACHE``, else ``fednorm`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("FEDNORM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fednorm"


def file_key(path: Path) -> str:
    """Return what identifies a file's content without reading it: its full name, size and time of change."""
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


def cached(
    name: str,
    key: Iterable[str],
    make: Callable[[], Pixels],
    cache_dir: Path | None = None,
    *,
    shape: tuple[int, ...] | None = None,
) -> Pixels:
    """Return ``make()``, or the array that an earlier call with the same key left on disk.

    Args:
        name: The beginning of the cache file's name, for a reader's eyes.
        key: Everything that the array depends on.
        make: Makes the array, uint8.
        cache_dir: Where to keep it (:func:`cache_folder`).
        shape: The array's shape; a file of another shape is no such array and is made anew. None takes any.

    Returns:
        The array: memory-mapped copy-on-write (NumPy's mode ``"c"``: the file is never changed, and PyTorch does not
        warn as it does about read-only arrays), or in memory where the folder cannot be written.
    """
    digest = hashlib.sha256("\n".join([str(FORMAT_VERSION), *key]).encode()).hexdigest()[:20]
    target = cache_folder(cache_dir) / f"{name}-{digest}.npy"
    kept = _map(target, shape)
    if kept is not None:
        return kept
    made = make()
    try:
        _write(target, made)
    except OSError as error:
        log.info("Decoded images are not kept: cannot write %s (%s).", target, error.strerror)
        return made
    kept = _map(target, shape)
    return made if kept is None else kept


def _map(path: Path, shape: tuple[int, ...] | None) -> Pixels | None:
    """Map a cached array, or return None where there is none, a broken one, or what only looks like one."""
    if not path.is_file():  # opening a FIFO would wait for ever
        return None
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        whole = isinstance(array, np.memmap) and array.offset + array.nbytes == path.stat().st_size
    except Exception:
        # A damaged header makes NumPy raise what its parser leads it to, beside OSError and ValueError.
        return None
    if not whole or array.dtype != np.uint8 or not array.flags.c_contiguous:
        return None
    return None if shape is not None and array.shape != shape else array


def _write(target: Path, array: Pixels) -> None:
    """Write under a temporary name and rename, so that no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
