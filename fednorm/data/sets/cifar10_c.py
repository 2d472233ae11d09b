"""cifar10_c: CIFAR-10 under common corruptions, each a domain. Hendrycks, Dietterich, https://arxiv.org/abs/1903.12261.

Domains are ``clean`` and a corruption with its severity, ``fog_5``. All test images are there under each; the training
images are dealt to the domains that are trained on, no image to two, and corrupted as the domain is. A held-out domain
takes none of them: ``data.domains = ["clean", "fog_5"]`` with ``data.held_out = "fog_5"`` trains on clean images alone,
which is the published protocol. What is drawn depends on ``data.split_seed``, not on the run's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.cache import Pixels, cached, file_key
from fednorm.data.corruptions import CORRUPTIONS, LEFT_OUT, SEVERITIES, SIZE, corrupt
from fednorm.data.domain import Domain, Split
from fednorm.data.published import Published, windows
from fednorm.data.source import Rows, Source, to_square
from fednorm.errors import DataError
from fednorm.memory import require_memory
from fednorm.rng import stream

CLEAN = "clean"
DOMAINS = (CLEAN, *(f"{name}_{severity}" for name in CORRUPTIONS for severity in SEVERITIES))
USUAL = (CLEAN, *(f"{name}_5" for name in CORRUPTIONS))
"""The domains where none are named: every corruption at its worst, where test-time adaptation is measured."""

NOTE = (
    f"CIFAR-10-C's corruptions are computed here, from other random numbers than the published files; "
    f"{', '.join(LEFT_OUT)} are left out."
)

_CHUNK = 1000
_VERSION = 1
"""Part of the key of kept images: raise it when a corruption comes to mean other pixels."""


def _cifar10_c(reader: Reader) -> Loaded:
    source = replace(reader, image_size=SIZE).read("cifar10")
    names = reader.wanted(DOMAINS) or USUAL
    seed, held_out = reader.config.split_seed, reader.config.held_out
    trained = [name for name in names if name != held_out]
    dealt = stream(seed, "data", "cifar10_c", "parts").permutation(source.train)
    parts = dict(zip(trained, np.array_split(dealt, max(len(trained), 1)), strict=False))
    rows = [(name, np.sort(parts.get(name, source.train[:0])), source.test) for name in names]
    images = _images(reader, source, rows, seed)
    labels = torch.from_numpy(np.concatenate([source.labels[np.concatenate(own[1:])] for own in rows]))
    domains, start = [], 0
    for name, train, test in rows:
        first = torch.arange(start, start + len(train))
        second = torch.arange(start + len(train), start + len(train) + len(test))
        domains.append(Domain(name, Split(images, labels, first), Split(images, labels, second), source.note))
        start += len(train) + len(test)
    return loaded("CIFAR-10-C", [source], tuple(domains), (NOTE,))


def _images(reader: Reader, source: Source, rows: Sequence[tuple[str, Rows, Rows]], seed: int) -> torch.Tensor:
    """Return the images of every domain, training then test, one domain after another."""
    size, total = reader.image_size, sum(len(train) + len(test) for _, train, test in rows)
    if isinstance(reader, Published):
        return torch.from_numpy(windows(total, size))

    def make() -> Pixels:
        remedy = "Name fewer data.domains, or choose a smaller data.image_size."
        require_memory(3 * total * size * size, f"{total:,} corrupted images of {size} x {size}", remedy, DataError)
        out, place = np.empty((total, 3, size, size), dtype=np.uint8), 0
        for name, train, test in rows:
            for split, own in (("train", train), ("test", test)):
                for number, start in enumerate(range(0, len(own), _CHUNK)):
                    images = source.images[own[start : start + _CHUNK]].transpose(0, 2, 3, 1)
                    images = _as(name, images, stream(seed, "data", "cifar10_c", name, split, number))
                    out[place : place + len(images)] = _resized(images, size)
                    place += len(images)
        return out

    key = [
        f"cifar10_c {_VERSION} size={size} seed={seed}",
        *(file_key(Path(file)) for file, _ in source.files),
        *(f"{name} {len(train)} {len(test)}" for name, train, test in rows),
    ]
    return torch.from_numpy(cached(f"cifar10_c-{size}", key, make, reader.cache_dir, shape=(total, 3, size, size)))


def _as(name: str, images: Pixels, rng: np.random.Generator) -> Pixels:
    """Return images as a domain has them."""
    if name == CLEAN:
        return images
    corruption, _, severity = name.rpartition("_")
    return corrupt(np.ascontiguousarray(images), corruption, int(severity), rng)


def _resized(images: Pixels, size: int) -> Pixels:
    if size == SIZE:
        return images.transpose(0, 3, 1, 2)
    return np.stack([to_square(Image.fromarray(image), size) for image in np.ascontiguousarray(images)])


SPEC = Benchmark(
    name="cifar10_c",
    summary="CIFAR-10 under 15 computed corruptions of 5 severities, each a domain: clean, fog_5, gaussian_noise_3, …",
    note=f"Made from cifar10's files as it is read. {NOTE}",
    load=_cifar10_c,
)
