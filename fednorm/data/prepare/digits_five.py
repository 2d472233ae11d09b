"""Digits-Five: MNIST, MNIST-M, SVHN, USPS and Synthetic Digits, as Peng et al. collected them for DomainNet's paper.

https://arxiv.org/abs/1812.01754. The collection ``Digit-Five.zip`` holds files of MATLAB: images as uint8 or in [0, 1],
labels as numbers, with 10 for 0, or one-hot. Each set becomes a folder of its own, which benchmark ``digits_five``
reads together. FedBN's own files are pickles, which run code when they are opened; they are not read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

Array = npt.NDArray[Any]
Part = tuple[Array, Array]
"""Images, uint8, shape (N, H, W, 3) or (N, H, W), and labels, int64, shape (N,)."""

DOMAINS = ("mnist", "svhn", "usps", "syn", "mnistm")


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    for domain in wanted.of_domains(DOMAINS):
        train, test = _READ[domain](files)
        yield Images(domain, tuple(map(str, range(10))), _rows(train, test))


def _rows(train: Part, test: Part) -> Iterator[Row]:
    for image, label in zip(*train, strict=True):
        yield Row(image, int(label), "train")
    for image, label in zip(*test, strict=True):
        yield Row(image, int(label), "test")


def _mnist(files: Files) -> tuple[Part, Part]:
    mat = _mat(files, "mnist_data.mat", "train_28", "test_28", "label_train", "label_test")
    where = f"{files.place}: mnist_data.mat"
    train, test = (_part(mat[f"{split}_28"], mat[f"label_{split}"], where) for split in ("train", "test"))
    return train, test


def _mnistm(files: Files) -> tuple[Part, Part]:
    mat = _mat(files, "mnistm_with_label.mat", "train", "test", "label_train", "label_test")
    where = f"{files.place}: mnistm_with_label.mat"
    train, test = (_part(mat[split], mat[f"label_{split}"], where) for split in ("train", "test"))
    return train, test


def _usps(files: Files) -> tuple[Part, Part]:
    cells = _mat(files, "usps_28x28.mat", "dataset")["dataset"]
    where = f"{files.place}: usps_28x28.mat"
    if cells.shape != (2, 2):
        raise DataError(f"{where}: 'dataset' has shape {cells.shape}; expected 2 x 2 cells of images and labels")
    train, test = (_part(images, labels, where) for images, labels in cells)
    return train, test


def _street(stem: str) -> Callable[[Files], tuple[Part, Part]]:
    """Return what reads two files in the format of SVHN: X of shape (32, 32, 3, N), and y."""

    def read(files: Files) -> tuple[Part, Part]:
        parts = []
        for split in ("train", "test"):
            name = f"{stem}_{split}_32x32.mat"
            mat = _mat(files, name, "X", "y")
            parts.append(_part(np.moveaxis(mat["X"], -1, 0), mat["y"], f"{files.place}: {name}"))
        return parts[0], parts[1]

    return read


_READ: Mapping[str, Callable[[Files], tuple[Part, Part]]] = {
    "mnist": _mnist,
    "mnistm": _mnistm,
    "usps": _usps,
    "svhn": _street("svhn"),
    "syn": _street("synth"),
}


def _mat(files: Files, name: str, *keys: str) -> Mapping[str, Array]:
    """Return the variables of a MATLAB file."""
    from scipy.io import loadmat

    with files.opened(files.root(name) + name) as file:
        content = io.BytesIO(file.read())
    try:
        mat: Mapping[str, Array] = loadmat(content, variable_names=keys)
    except Exception as error:  # scipy raises whatever the damage leads it to
        raise DataError(
            f"{files.place}: {name} cannot be read as a MATLAB file ({error}). Download it again"
        ) from error
    missing = [key for key in keys if key not in mat]
    if missing:
        raise DataError(f"{files.place}: {name} has no variable {', '.join(missing)}; expected {', '.join(keys)}")
    return mat


def _part(images: Array, labels: Array, where: str) -> Part:
    """Return images as uint8 and labels as numbers, checked."""
    count = len(images)
    if labels.ndim == 2 and labels.shape == (count, 10) and count:
        labels = labels.argmax(axis=1)
    labels = labels.reshape(-1).astype(np.int64)
    if len(labels) != count:
        raise DataError(f"{where}: there are {count} images and {len(labels)} labels. Download it again")
    labels = np.where(labels == 10, 0, labels)
    if images.ndim == 2:  # flat
        side = int(np.sqrt(images.shape[1]))
        images = images.reshape(count, side, side)
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = np.moveaxis(images, 1, -1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise DataError(f"{where}: images have shape {images.shape}; expected N images of one or three channels")
    if images.dtype != np.uint8:
        top = float(images.max(initial=0))
        scaled = images * 255.0 if top <= 1 else images
        images = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return images, labels


RECIPE = Recipe(
    name="digits_five",
    title="Digits-Five",
    source="https://github.com/VisionLearningGroup/VisionLearningGroup.github.io/tree/master/M3SDA",
    archives=(Archive("Digit-Five.zip"),),
    images=_images,
    folders=DOMAINS,
    layout="mnist_data.mat, mnistm_with_label.mat, usps_28x28.mat, {svhn,synth}_{train,test}_32x32.mat",
    has_domains=True,
)
