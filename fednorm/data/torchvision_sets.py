"""MNIST, USPS, SVHN, CIFAR-10 and CIFAR-100 in torchvision's own on-disk format, read by torchvision.

``DIR/MNIST/raw``, ``DIR/usps.bz2``, ``DIR/train_32x32.mat`` (SVHN), ``DIR/cifar-10-batches-py`` and
``DIR/cifar-100-python``: what ``torchvision.datasets.X(root=DIR, download=True)`` leaves behind. torchvision checks the
MD5 sums of SVHN and CIFAR before it opens them, which is what stands between a stranger's pickle and this process;
fednorm leaves that check on. It does not check MNIST and USPS, which are not pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fednorm.data.cache import Pixels, cached, file_key
from fednorm.data.shards import require_regular
from fednorm.data.source import Rows, Source, stack
from fednorm.errors import DataError


@dataclass(frozen=True)
class _Set:
    """Where torchvision keeps a data set, and how to open it.

    Attributes:
        class_name: The class in ``torchvision.datasets``.
        train_files: The files of its training images, relative to the root.
        test_files: The files of its test images.
        split: The keyword arguments of a split, from whether it is the training split.
        labels: The attribute that holds the labels.
        preferred_files: Files of an older format that torchvision reads instead where it finds them.
    """

    class_name: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    split: Callable[[bool], dict[str, Any]] = lambda train: {"train": train}
    labels: str = "targets"
    preferred_files: tuple[str, ...] = ()


_CIFAR10 = "cifar-10-batches-py"
_CIFAR100 = "cifar-100-python"
_MNIST = "MNIST/raw"

SETS: dict[str, _Set] = {
    "mnist": _Set(
        "MNIST",
        (f"{_MNIST}/train-images-idx3-ubyte", f"{_MNIST}/train-labels-idx1-ubyte"),
        (f"{_MNIST}/t10k-images-idx3-ubyte", f"{_MNIST}/t10k-labels-idx1-ubyte"),
        preferred_files=("MNIST/processed/training.pt", "MNIST/processed/test.pt"),
    ),
    "usps": _Set("USPS", ("usps.bz2",), ("usps.t.bz2",)),
    "svhn": _Set(
        "SVHN",
        ("train_32x32.mat",),
        ("test_32x32.mat",),
        lambda train: {"split": "train" if train else "test"},
        "labels",
    ),
    "cifar10": _Set(
        "CIFAR10",
        (*(f"{_CIFAR10}/data_batch_{i}" for i in range(1, 6)), f"{_CIFAR10}/batches.meta"),
        (f"{_CIFAR10}/test_batch",),
    ),
    "cifar100": _Set("CIFAR100", (f"{_CIFAR100}/train", f"{_CIFAR100}/meta"), (f"{_CIFAR100}/test",)),
}
"""The data sets by fednorm's name."""


def list_torchvision(directory: Path) -> tuple[str, ...]:
    """Return the names of the data sets that a directory holds whole in torchvision's format, sorted."""
    return tuple(
        sorted(name for name, entry in SETS.items() if all(_is_there(path) for path in _paths(directory, entry)))
    )


def read_torchvision(
    directory: Path, name: str, image_size: int, *, download: bool = False, cache_dir: Path | None = None
) -> Source:
    """Read one data set in torchvision's format.

    Args:
        directory: torchvision's ``root``.
        name: A key of :data:`SETS`.
        image_size: S, the height and width to resize to.
        download: Whether torchvision may download what is missing; never otherwise.
        cache_dir: Where decoded arrays are kept (:func:`fednorm.data.cache.cache_folder`).

    Returns:
        The data set; its training images come first. SVHN's label 10 is 0, as torchvision gives it.

    Raises:
        DataError: The files are missing, broken or no regular files, there are not as many labels as images, or the
            download failed.
    """
    entry = SETS[name]
    preferred = [path for file in entry.preferred_files if _is_there(path := directory / file)]
    for path in (*_paths(directory, entry), *preferred):
        if _is_there(path):
            require_regular(path)
    train, test = (_open(directory, name, train=train, download=download) for train in (True, False))
    num_train, total = len(train), len(train) + len(test)
    labels: Rows = np.concatenate([_labels(directory, name, part) for part in (train, test)])
    class_names = tuple(str(label) for label in range(10))
    if name.startswith("cifar"):
        class_names = tuple(train.classes)

    def decode() -> Pixels:
        return stack(_images((train, test)), total, image_size)

    key = [
        "torchvision",
        name,
        f"image_size={image_size}",
        *(file_key(path) for path in (*_paths(directory, entry), *preferred)),
    ]
    return Source(
        name=name,
        images=cached(f"{name}-{image_size}", key, decode, cache_dir, shape=(total, 3, image_size, image_size)),
        labels=labels,
        train=np.arange(num_train, dtype=np.int64),
        test=np.arange(num_train, total, dtype=np.int64),
        files=(
            (str(directory / entry.train_files[0]), num_train),
            (str(directory / entry.test_files[0]), total - num_train),
        ),
        class_names=class_names,
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _labels(directory: Path, name: str, part: Any) -> Rows:
    """Return a split's labels, one for each of its images."""
    labels: Rows = np.asarray(getattr(part, SETS[name].labels), dtype=np.int64).reshape(-1)
    if len(labels) != len(part.data):
        raise DataError(
            f"The files of {name} in {directory} hold {len(part.data)} images and {len(labels)} labels. "
            "Copy them again."
        )
    return labels


def _paths(directory: Path, entry: _Set) -> Sequence[Path]:
    return [directory / file for file in (*entry.train_files, *entry.test_files)]


def _images(parts: Sequence[Any]) -> Iterator[Image.Image]:
    for part in parts:
        for row in range(len(part)):
            yield part[row][0]


def _open(directory: Path, name: str, *, train: bool, download: bool) -> Any:
    """Open one split with torchvision, whose many ways to fail become one."""
    # Imported here because it takes a second that Parquet folders need not wait for.
    import torchvision.datasets

    entry = SETS[name]
    try:
        return getattr(torchvision.datasets, entry.class_name)(str(directory), download=download, **entry.split(train))
    except Exception as error:
        files = ", ".join(entry.train_files if train else entry.test_files)
        remedy = "Remove them and try again." if download else "Copy them again, or allow the download with --download."
        raise DataError(
            f"torchvision cannot read {name} from {directory} ({type(error).__name__}: {error}). Expected whole, "
            f"unchanged files {files}. {remedy}"
        ) from error
