"""torchvision's formats in tiny files; where torchvision checks MD5 sums, it is told those of the tiny files."""

from __future__ import annotations

import bz2
import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from PIL import Image

from fednorm.config import DataConfig
from fednorm.data import load_federation
from fednorm.data.torchvision_sets import list_torchvision, read_torchvision
from fednorm.errors import DataError

RNG = np.random.default_rng(0)


def _mnist(root: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.array([0, 1, 2, 3, 4, 5], dtype=np.uint8)
    for name, part in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        x, y = images[part], labels[part]
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, len(x), 28, 28) + x.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(y)) + y.tobytes())
    return images, labels


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """Write the pickles and tell torchvision their checksums."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    folder = root / cls.base_folder
    folder.mkdir()
    files = [file for file, _ in (*cls.train_list, *cls.test_list)]
    images = RNG.integers(0, 256, (2 * len(files), 3, 32, 32), dtype=np.uint8)
    labels = [i % 3 for i in range(2 * len(files))]
    for i, file in enumerate(files):
        entry = {"data": images[2 * i : 2 * i + 2].reshape(2, -1), key: labels[2 * i : 2 * i + 2]}
        (folder / file).write_bytes(pickle.dumps(entry))
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: ["a", "b", "c"]}))
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cls, attribute, [[file, _md5(folder / file)] for file, _ in getattr(cls, attribute)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": _md5(meta)})
    return images, labels


def test_mnist_in_idx_files(tmp_path: Path) -> None:
    images, labels = _mnist(tmp_path)
    assert list_torchvision(tmp_path) == ("mnist",)
    source = read_torchvision(tmp_path, "mnist", 28)
    np.testing.assert_array_equal(source.images, images[:, None].repeat(3, 1))
    assert source.labels.tolist() == labels.tolist()
    assert (source.train.tolist(), source.test.tolist()) == ([0, 1, 2, 3], [4, 5])
    resized = np.asarray(Image.fromarray(images[5]).resize((14, 14), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(read_torchvision(tmp_path, "mnist", 14).images[5, 1], resized)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_pickles(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = _cifar(tmp_path, name, monkeypatch)
    source = read_torchvision(tmp_path, name, 32)
    np.testing.assert_array_equal(source.images, images)
    assert source.labels.tolist() == labels
    assert len(source.test) == 2
    assert source.class_names == ("a", "b", "c")
    federation = load_federation(DataConfig(name=name, dir=str(tmp_path)), image_size=32, seed=1)
    assert federation.num_classes == 3


def test_a_pickle_of_another_checksum_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cifar(tmp_path, "cifar10", monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "data_batch_1").open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled a changed file"))
    with pytest.raises(DataError, match=r"cannot read cifar10 .*corrupted.*cifar-10-batches-py/data_batch_1"):
        read_torchvision(tmp_path, "cifar10", 32)


def test_svhn_in_mat_files_has_zero_for_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": images[..., :3], "y": np.array([[1], [10], [9]])})
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": images[..., 3:], "y": np.array([[10], [2]])})
    sums = {s: ["", f"{s}_32x32.mat", _md5(tmp_path / f"{s}_32x32.mat")] for s in ("train", "test")}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)
    source = read_torchvision(tmp_path, "svhn", 32)
    np.testing.assert_array_equal(source.images, images.transpose(3, 2, 0, 1))
    assert source.labels.tolist() == [1, 0, 9, 0, 2]


def test_usps_in_libsvm_files(tmp_path: Path) -> None:
    pixels = RNG.uniform(-1, 1, (3, 256)).astype(np.float32)

    def line(label: int, row: np.ndarray) -> str:
        return f"{label} " + " ".join(f"{i + 1}:{value:.6f}" for i, value in enumerate(row))

    with bz2.open(tmp_path / "usps.bz2", "wt") as file:
        file.write("\n".join([line(1, pixels[0]), line(10, pixels[1])]))
    with bz2.open(tmp_path / "usps.t.bz2", "wt") as file:
        file.write("\n".join([line(4, pixels[2]), line(2, pixels[0])]))
    source = read_torchvision(tmp_path, "usps", 16)
    expected = np.trunc((pixels.astype(np.float64) + 1) / 2 * 255).reshape(3, 16, 16)
    assert np.abs(source.images[:3, 0] - expected).max() <= 1
    assert source.labels.tolist() == [0, 9, 3, 1]


def test_the_parquet_folder_is_preferred(tmp_path: Path, write_folder: Any) -> None:
    _mnist(tmp_path)
    write_folder(tmp_path, "mnist", num_train=7, num_test=2)
    (client,) = load_federation(DataConfig(name="digits", dir=str(tmp_path)), image_size=8, seed=1).clients
    assert len(client.train) == 7


def test_nothing_is_downloaded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Fake:
        def __init__(self, _root: str, *, download: bool, **_: object) -> None:
            asked.append(download)
            raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "SVHN", Fake)
    config = {"name": "digits", "dir": str(tmp_path / "new"), "domains": ("svhn",)}
    (tmp_path / "new").mkdir()
    with pytest.raises(DataError, match=r"'svhn' is not in .*--download"):
        load_federation(DataConfig(**config), image_size=28, seed=1)
    assert asked == []
    with pytest.raises(DataError, match=r"cannot read svhn .*no network"):
        load_federation(DataConfig(**config, download=True), image_size=28, seed=1)
    assert asked == [True]


@pytest.mark.parametrize("file", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_a_fifo_among_torchvisions_files_is_refused_and_never_opened(tmp_path: Path, file: str) -> None:
    _mnist(tmp_path)
    (tmp_path / "MNIST/raw" / file).unlink()
    os.mkfifo(tmp_path / "MNIST/raw" / file)
    assert list_torchvision(tmp_path) == ("mnist",)
    with pytest.raises(DataError, match=f"{file} is a FIFO; expected a regular file"):
        read_torchvision(tmp_path, "mnist", 28)


def test_fewer_labels_than_images_are_refused(tmp_path: Path) -> None:
    _mnist(tmp_path)
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">II", 2049, 3) + bytes(3))
    with pytest.raises(DataError, match=r"mnist in .* hold 4 images and 3 labels"):
        read_torchvision(tmp_path, "mnist", 28)


def test_an_idx_file_that_announces_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    _mnist(tmp_path)
    images = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    images.write_bytes(struct.pack(">IIII", 2051, 2**31 - 1, 28, 28) + images.read_bytes()[16:])
    with pytest.raises(DataError, match="cannot read mnist"):
        read_torchvision(tmp_path, "mnist", 28)
