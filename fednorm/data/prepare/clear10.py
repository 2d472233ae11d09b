"""CLEAR-10: ten buckets of photographs, 2004 to 2014, each with eleven classes. Lin et al., NeurIPS 2021 (data sets).

https://arxiv.org/abs/2201.06289. The archives ``clear10-train.zip`` and ``clear10-test.zip`` each hold
``class_names.txt`` and ``labeled_metadata.json``, which names a file of images for each bucket and class. Buckets
become the domains ``bucket_01`` to ``bucket_10``, in the order of time; training and test images are the official ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

METADATA = "labeled_metadata.json"


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    classes: tuple[str, ...] = ()
    entries: list[Row] = []
    for split in ("train", "test"):
        root = files.root(f"{split}/{METADATA}") + f"{split}/"
        own = tuple(files.lines("class_names.txt", root))
        if classes and own != classes:
            raise DataError(f"{files.place}: the classes of train and test differ: {classes} and {own}")
        classes = own
        buckets = _json(files, METADATA, root)
        names = {_domain(files, bucket): bucket for bucket in buckets}
        for domain in wanted.of_domains(sorted(names)):
            for label, name in enumerate(classes):
                if name not in buckets[names[domain]]:
                    raise DataError(f"{files.place}: {root}{METADATA} has no class {name!r} in bucket {names[domain]}")
                listed = _json(files, str(buckets[names[domain]][name]), root)
                for image in listed.values():
                    entries.append(Row(root + _path(files, image), label, split, domain))
    yield Images("clear10", classes, iter(entries))


def _domain(files: Files, bucket: str) -> str:
    if not bucket.isdecimal():
        raise DataError(f"{files.place}: {METADATA} names bucket {bucket!r}; expected a number")
    return f"bucket_{int(bucket):02d}"


def _path(files: Files, image: Any) -> str:
    if not isinstance(image, dict) or not isinstance(image.get("IMG_PATH"), str):
        raise DataError(f"{files.place}: an image of {METADATA} has no IMG_PATH: {str(image)[:80]}")
    path: str = image["IMG_PATH"]
    return path.removeprefix("./")


def _json(files: Files, name: str, root: str) -> dict[str, Any]:
    text = files.text(name, root)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{files.place}: {root}{name} is no JSON ({error}). Download it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{files.place}: {root}{name} holds a {type(value).__name__}; expected an object")
    return value


RECIPE = Recipe(
    name="clear10",
    title="CLEAR-10",
    source="https://clear-benchmark.github.io",
    archives=(Archive("clear10-train.zip"), Archive("clear10-test.zip")),
    images=_images,
    folders=("clear10",),
    layout="{train,test}/{class_names.txt,labeled_metadata.json} and the images that these name",
    has_domains=True,
)
