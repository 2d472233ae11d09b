"""Importing Avalanche without what its optional solvers say of themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def avalanche_imports() -> Iterator[None]:
    """Keep quiet about GEM's solvers, which Avalanche imports whatever is asked of it; they matter to GEM alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no QP solver found", UserWarning)
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        yield
