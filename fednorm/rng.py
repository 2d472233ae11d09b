"""Randomness by name: every consumer draws from its own stream, derived from the seed and a path of names.

No code of fednorm draws from a process-wide generator of its own accord. Where PyTorch leaves no choice
(initialising a layer, dropout), :func:`torch_seeded` sets the process-wide one for a block and puts it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

Name = str | int


def stream_seed(seed: int, *names: Name) -> int:
    """Return the 63-bit seed of the stream called ``names``, e.g. ``stream_seed(1, "client", 3, "round", 7)``.

    Derived by hashing, so adding one stream never disturbs another, and every stream depends on ``seed``.
    """
    path = "\x1f".join([str(int(seed)), *(f"{type(name).__name__}:{name}" for name in names)])
    return _hashed(path)


def _hashed(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *names: Name) -> np.random.Generator:
    """Return an independent NumPy generator for the stream called ``names``."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, *names)))


def torch_streams(
    seed: int, before: Sequence[Name], names: Iterable[Name], after: Sequence[Name]
) -> list[torch.Generator]:
    """Return a :func:`torch_stream` for each of some names, called ``before``, the name, ``after``."""
    first, last = ("".join(f"\x1f{type(name).__name__}:{name}" for name in part) for part in (before, after))
    return [_generator(_hashed(f"{int(seed)}{first}\x1f{type(name).__name__}:{name}{last}")) for name in names]


def torch_stream(seed: int, *names: Name) -> torch.Generator:
    """Return an independent PyTorch CPU generator for the stream called ``names``."""
    return _generator(stream_seed(seed, *names))


def _generator(value: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(value)
    return generator


@contextmanager
def torch_seeded(seed: int, *names: Name) -> Iterator[None]:
    """Run a block with PyTorch's process-wide generator at the start of the stream ``names``, then restore it.

    For what takes no generator argument: a layer's initialisation, dropout.
    """
    on_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()  # to count takes its time
    if on_mps is None and not devices:  # the same as below, which takes as long as a small client's optimizer
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(stream_seed(seed, *names))
        try:
            yield
        finally:
            torch.default_generator.set_state(before)
        return
    with torch.random.fork_rng(devices=devices):
        reseed(stream_seed(seed, *names))
        try:
            yield
        finally:
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


def reseed(value: int) -> None:
    """Set PyTorch's process-wide generators, the CPU's and those of every accelerator, within :func:`torch_seeded`."""
    # torch.manual_seed also prepares for devices that are not there, which costs a third of a millisecond.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
