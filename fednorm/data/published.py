"""Data sets of the published sizes, of random images: for what asks how many images there are before there are any."""

from __future__ import annotations

from typing import Any

import numpy as np

from fednorm.cards import DATA
from fednorm.data.benchmarks import Reader
from fednorm.data.source import Source
from fednorm.errors import DataError
from fednorm.memory import require_memory
from fednorm.rng import stream


class Published(Reader):
    """Reads no file: the labels of a data set are one class after the other, and its images overlap in memory."""

    def held(self) -> tuple[str, ...]:
        """Return what a folder with every published data set would hold."""
        return tuple(sorted(name for card in DATA if card.ships for name in card.sizes))

    def read(self, name: str) -> Source:
        """Return a data set of the size that its card says.

        Raises:
            DataError: No card says it.
        """
        sizes = next((card.sizes[name] for card in DATA if card.ships and name in card.sizes), None)
        if sizes is None:
            raise DataError(
                f"The size of data set {name!r} is not known without its files. Name their folder with --data-dir DIR "
                "(data.dir)."
            )
        classes, domains = sizes
        train, test = (sum(count[split] for count in domains.values()) for split in (0, 1))
        of_row = np.concatenate([np.repeat(list(domains), [c[split] for c in domains.values()]) for split in (0, 1)])
        rows = np.arange(train + test, dtype=np.int64)
        return Source(
            name=name,
            images=windows(train + test, self.image_size),
            labels=rows % classes,
            train=rows[:train],
            test=rows[train:],
            files=(),
            class_names=tuple(map(str, range(classes))),
            domains=of_row if len(domains) > 1 else None,
        )


def windows(count: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return random images, uint8, shape (count, 3, size, size), each the one before moved on by a byte.

    A hundred thousand of them take the memory of a few.
    """
    remedy = "Choose a smaller data.image_size."
    require_memory(count + 3 * size * size, f"Images of {size} x {size} pixels, to estimate from,", remedy, DataError)
    numbers = stream(0, "estimate", "images").integers(0, 256, count + 3 * size * size, dtype=np.uint8)
    strides = (1, size * size, size, 1)
    return np.lib.stride_tricks.as_strided(numbers, (count, 3, size, size), strides)
