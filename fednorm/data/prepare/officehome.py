"""Office-Home: 65 classes in four domains. Venkateswara et al., Deep Hashing Network, CVPR 2017.

https://arxiv.org/abs/1706.07522. Four folders of folders of classes and no official split: a fifth of each class's
images of each domain are for testing, by the same rule and seed as in ``image_folders``
(:func:`fednorm.data.partition.train_and_test`, split seed 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from fednorm.data.own import split_note
from fednorm.data.partition import train_and_test
from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

DOMAINS = {"Art": "art", "Clipart": "clipart", "Product": "product", "Real World": "real_world"}
"""What the domains' folders are called, and what the domains are."""

SUFFIXES = (".jpg", ".jpeg", ".png")


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    parts = [path.parts for path in map(PurePosixPath, files) if path.suffix.lower() in SUFFIXES and path.parts[2:]]
    own = [part for part in parts if _domain(part[-3])]
    there = {_domain(part[-3]) for part in own}
    domains = wanted.of_domains(tuple(DOMAINS.values()))
    missing = sorted(set(domains) - there)
    if missing:
        raise DataError(f"{files.place} holds no images of {', '.join(missing)}; it holds {files.there()}")
    names = sorted({part[-2] for part in own if _domain(part[-3]) in domains})
    classes = wanted.of_classes(names)

    def rows() -> Iterator[Row]:
        for domain in domains:
            paths = [part for part in own if _domain(part[-3]) == domain and part[-2] in classes]
            labels = np.array([classes.index(part[-2]) for part in paths], dtype=np.int64)
            _, test = train_and_test(domain, labels, 0)
            tested = set(test.tolist())
            for number, part in enumerate(paths):
                split = "test" if number in tested else "train"
                yield Row("/".join(part), int(labels[number]), split, domain)  # type: ignore[arg-type]

    yield Images("officehome", classes, rows(), (split_note(domains, 0),))


def _domain(folder: str) -> str:
    """Return the domain that a folder is, or nothing; mirrors write the fourth one's name together or with ``_``."""
    plain = {name.replace(" ", "").lower(): domain for name, domain in DOMAINS.items()}
    return plain.get(folder.replace(" ", "").replace("_", "").lower(), "")


RECIPE = Recipe(
    name="officehome",
    title="Office-Home",
    source="https://www.hemanthdv.org/officeHomeDataset.html",
    archives=(Archive("OfficeHomeDataset_10072016.zip"),),
    images=_images,
    folders=("officehome",),
    layout="OfficeHomeDataset_10072016/{Art,Clipart,Product,Real World}/CLASS/*.jpg",
    has_domains=True,
    has_classes=True,
)
