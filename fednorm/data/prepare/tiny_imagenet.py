"""Tiny-ImageNet: 200 classes of 500 training and 50 validation images, 64 x 64. Le, Yang, Stanford CS 231N, 2015.

The classes have the order of ``wnids.txt`` and the first of their names in ``words.txt``. The labels of the test images
were never published, so that the validation images are what everybody tests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

ANNOTATIONS = "val/val_annotations.txt"
NOTE = "tiny_imagenet: the validation images are the test images here; those of the test set have no labels."


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    root = files.root("wnids.txt")
    ids = files.lines("wnids.txt", root)
    names = dict(zip(ids, _names(files, root, ids), strict=True))
    kept = wanted.of_classes(tuple(names.values()))
    number = {wnid: kept.index(name) for wnid, name in names.items() if name in kept}

    def rows() -> Iterator[Row]:
        for wnid, label in number.items():
            for path in files.below(f"{root}train/{wnid}/"):
                if path.upper().endswith(".JPEG"):
                    yield Row(f"{root}train/{wnid}/{path}", label, "train")
        for line_number, line in enumerate(files.lines(ANNOTATIONS, root), start=1):
            image, wnid = (*line.split("\t"), "", "")[:2]
            if wnid not in names:
                raise DataError(
                    f"{files.place}: {ANNOTATIONS}, line {line_number}: class {wnid!r} is none of wnids.txt"
                )
            if wnid in number:
                yield Row(f"{root}val/images/{image}", number[wnid], "test")

    yield Images("tiny_imagenet", kept, rows(), (NOTE,))


def _names(files: Files, root: str, ids: list[str]) -> list[str]:
    """Return the first name of each class; where two have the same one, the class's number in WordNet beside it."""
    words = dict(line.split("\t", 1) for line in files.lines("words.txt", root) if "\t" in line)
    first = [words.get(wnid, wnid).split(",")[0].strip() for wnid in ids]
    often = Counter(first)
    return [name if often[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(first, ids, strict=True)]


RECIPE = Recipe(
    name="tiny_imagenet",
    title="Tiny-ImageNet",
    source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    archives=(Archive("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
    images=_images,
    folders=("tiny_imagenet",),
    layout="tiny-imagenet-200/{wnids.txt,words.txt}, train/WNID/images/*.JPEG, val/val_annotations.txt, val/images",
    has_classes=True,
)
