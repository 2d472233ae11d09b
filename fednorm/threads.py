"""What a run sets for the whole process while it goes: PyTorch's threads, and what the garbage collector looks at."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run a block with a number of PyTorch threads, then restore it: the last bits of sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def lasting_objects() -> Iterator[None]:
    """Run a block in which the garbage collector leaves alone what was there before.

    That is the libraries, and the run's clients: to look through all of it takes a sixth of a second, which a round of
    a thousand small clients asks for now and then by the objects it makes.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
