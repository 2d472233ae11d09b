"""image_folders: trees of image files, their layouts, classes by name, splits, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fednorm.cards import DATA, SCENARIOS
from fednorm.config import DataConfig
from fednorm.data.benchmarks import Loaded, Reader
from fednorm.data.cache import cache_folder
from fednorm.errors import DataError

S = 4


def write(path: Path, level: int, form: str = "PNG") -> None:
    """Write a grey image of one level, by which it is known again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 3), level, dtype=np.uint8)).save(path, form)


def tree(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    """Write a folder of classes with so many images of each, of levels from ``first`` on."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write(folder / name / f"{number}.png", first)
            first += 1


def read(directory: Path, **config: Any) -> Loaded:
    return DATA["image_folders"].read(Reader(DataConfig(name="image_folders", dir=str(directory), **config), S))


def held(split: Any) -> dict[int, int]:
    """Return the label of each image by its level."""
    images, labels = split.batch(torch.arange(len(split)))
    assert all(bool((image == image[0, 0, 0]).all()) for image in images)
    return dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, the cache not in it."""
    path = tmp_path / "pets"
    path.mkdir()
    return path


def test_domains_with_test_images_of_their_own(folder: Path) -> None:
    tree(folder / "photo/train", {"cat": 2, "dog": 1})
    tree(folder / "photo/test", {"dog": 2}, 10)
    tree(folder / "art/train", {"dog": 1, "cat": 1}, 20)
    tree(folder / "art/val", {"cat": 1}, 30)
    loaded = read(folder)
    assert (loaded.title, loaded.num_classes) == ("image folders (art, photo)", 2)
    art, photo = loaded.domains
    assert (held(photo.train), held(photo.test)) == ({0: 0, 1: 0, 2: 1}, {10: 1, 11: 1})
    assert (held(art.train), held(art.test)) == ({20: 1, 21: 0}, {30: 0})
    assert loaded.notes == ("art has no test images: its validation images are the test images here.",)
    assert [domain.name for domain in read(folder, domains=("photo",)).domains] == ["photo"]
    assert list(cache_folder().glob("photo-4-*.npy")), "decoded images are kept"
    write(folder / "photo/test/dog/0.png", 99)
    os.utime(folder / "photo/test/dog/0.png", (1, 1))
    assert held(read(folder).domains[1].test) == {99: 1, 11: 1}, "a changed file is read anew"


def test_domains_without_test_images_are_split(folder: Path) -> None:
    for number, name in enumerate("ab"):
        tree(folder / name, {"0": 10, "1": 10, "10": 10, "2": 10}, 40 * number)
    loaded = read(folder)
    assert loaded.num_classes == 4
    for number, domain in enumerate(loaded.domains):
        train, test = held(domain.train), held(domain.test)
        # Classes are numbered in natural order: 10 comes after 2.
        assert train | test == {40 * number + k: (0, 1, 3, 2)[k // 10] for k in range(40)}
        assert sorted(test.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "split 80/20" in loaded.notes[0]
    assert held(read(folder, split_seed=1).domains[0].test) != held(loaded.domains[0].test)
    stream = SCENARIOS["domain_digits"].stream(
        DataConfig(name="image_folders", dir=str(folder)), image_size=S, seed=1, options={"domain_order": "given"}
    )
    assert [experience.title for experience in stream] == ["a", "b"]


@pytest.mark.parametrize("splits", [False, True])
def test_one_domain(folder: Path, splits: bool) -> None:
    if splits:
        tree(folder / "train", {"cat": 2, "dog": 2})
        tree(folder / "test", {"cat": 1}, 10)
    else:
        tree(folder, {"cat": 5, "dog": 5})
    (domain,) = read(folder).domains
    assert domain.name == "pets"
    expected = {0: 0, 1: 0, 2: 1, 3: 1, 10: 0} if splits else {k: k // 5 for k in range(10)}
    assert held(domain.train) | held(domain.test) == expected


def test_formats_hidden_files_and_others(folder: Path) -> None:
    for number, form in enumerate(("PNG", "BMP", "TIFF", "GIF", "WEBP")):
        write(folder / "cat" / f"{number}.{form}", 10 * number, form)
    tree(folder, {"dog": 5}, 100)
    for name in (".DS_Store", "cat/.hidden.png", "cat/readme.txt", "labels.csv"):
        (folder / name).write_bytes(b"x")
    (folder / ".ipynb_checkpoints").mkdir()
    loaded = read(folder)
    (domain,) = loaded.domains
    assert len(domain.train) + len(domain.test) == 10
    assert {level for level, label in (held(domain.train) | held(domain.test)).items() if label == 1} == set(
        range(100, 105)
    )
    assert loaded.notes[0].endswith("2 files that are no images were left out (such as labels.csv).")


def test_an_empty_folder_is_a_class_without_images(folder: Path) -> None:
    tree(folder / "a", {"cat": 3, "dog": 3})
    tree(folder / "b", {"cat": 3, "dog": 0}, 10)
    loaded = read(folder)
    assert loaded.num_classes == 2
    assert set((held(loaded.domains[1].train) | held(loaded.domains[1].test)).values()) == {0}


def _other_classes(path: Path) -> None:
    tree(path / "a", {"cat": 3, "dog": 3})
    tree(path / "b", {"cat": 3, "cow": 3})


def _other_test_class(path: Path) -> None:
    tree(path / "a/train", {"cat": 3})
    tree(path / "a/test", {"cow": 3})


def _classes_beside_domains(path: Path) -> None:
    tree(path, {"cat": 3})
    tree(path / "a", {"cat": 3})


def _too_deep(path: Path) -> None:
    tree(path / "a/b", {"cat": 3})


def _not_read(path: Path) -> None:
    tree(path / "a", {"cat": 3})
    (path / "a/cat/x.ppm").write_bytes(b"P6")


def _broken(path: Path) -> None:
    tree(path, {"cat": 3})
    (path / "cat/1.png").write_bytes(b"no image")


def _pipe(path: Path) -> None:
    tree(path, {"cat": 3})
    os.mkfifo(path / "cat/x.png")


def _stray(path: Path) -> None:
    tree(path / "a", {"cat": 3})
    write(path / "a/x.png", 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "holds no folder of images; expected DIR/DOMAIN/CLASS"),
        (lambda path: (path / "a").mkdir(), "holds no images"),
        (lambda path: tree(path, {"cat": 1}), "has one image, which cannot be split"),
        (lambda path: tree(path / "test", {"cat": 2}), "has no training images"),
        (_other_classes, "'dog' only in .*/a, 'cow' only in .*/b"),
        (_other_test_class, "test has class cow, which .*train has not: cat"),
        (_classes_beside_domains, r"folders of images \(cat\) beside folders of folders \(a\)"),
        (_too_deep, "cat is a folder where images of class b are expected"),
        (_not_read, "x.ppm is an image of a kind that is not read"),
        (_broken, r"1.png: the image cannot be decoded"),
        (_pipe, "x.png is a FIFO"),
        (_stray, "x.png stands in no class's folder"),
    ],
)
def test_unfit_trees_are_refused(make: Callable[[Path], object], message: str, folder: Path) -> None:
    make(folder)
    with pytest.raises(DataError, match=message):
        read(folder)
