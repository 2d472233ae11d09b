"""What becomes of large blocks of memory between two uses: kept, while a run goes on.

Linux's C library gives every block above 32 MiB back to the system when it is freed, and gets it anew, page by page,
when the next one is asked for. The gradient of a large layer and a copy of a large model are freed and asked for again
in every step: on the 14-million-parameter network of the digits, whose largest layer has 51 MB, that costs a sixth of a
round. So blocks of up to 64 MiB are kept while a run goes on, and handed back at its end. Not larger ones: before
version 2.38 the library seldom finds room for an aligned block where one of the same size was, and with the
activations of a ResNet-18 on images of 128 × 128, of 134 MB, a run took 59 % more memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The C library's numbers for ``mallopt``: above how many free bytes at the end of the heap it gives them back, and
from how many bytes on a block is got from the system by itself."""

_KEPT = 2**31 - 1, 64 * 2**20
"""Both, while blocks are kept."""

_USUAL = 64 * 2**20, 32 * 2**20
"""Both, else: the most that the library chooses by itself, which it stops to do once it has been told."""

_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which somebody has chosen otherwise, or another library."""

_depth = 0


def keep_large_blocks() -> bool:
    """Keep freed blocks from now on; return whether that is so: with Linux's usual C library it is."""
    library = _library()
    return library is not None and _set(library, *_KEPT)


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Run a block in which freed memory is kept for the next use, and hand it back at the end."""
    global _depth
    library = _library()
    if library is None:
        yield
        return
    _depth += 1
    _set(library, *_KEPT)
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _set(library, *_USUAL)
            library.malloc_trim(0)


def _library() -> ctypes.CDLL | None:
    """Return the C library where it can be told, and nobody has told it anything else."""
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _set(library: ctypes.CDLL, trim: int, mmap: int) -> bool:
    return bool(library.mallopt(_TRIM_THRESHOLD, trim)) and bool(library.mallopt(_MMAP_THRESHOLD, mmap))
