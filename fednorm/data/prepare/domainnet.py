"""DomainNet: 345 classes in six domains. Peng et al., Moment Matching for Multi-Source Domain Adaptation, ICCV 2019.

https://arxiv.org/abs/1812.01754. Each domain is an archive of folders of classes and two lists of lines
``clipart/aircraft_carrier/clipart_001_000018.jpg 0``, which are the official split; classes have the lists' numbers. Of
``clipart`` and ``painting`` the authors recommend the cleaned archives, of the same names. FedBN's ten classes
(https://arxiv.org/abs/2102.07623, section 4.2) are ``--classes fedbn``; its split of their images is not published as a
list of this kind, and is not reproduced.
"""

from __future__ import annotations

from collections.abc import Iterator

from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
SPLITS = ("train", "test")
FEDBN = (
    "bird",
    "feather",
    "headphones",
    "ice_cream",
    "teapot",
    "tiger",
    "whale",
    "windmill",
    "wine_glass",
    "zebra",
)
"""The ten classes that FedBN takes."""


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    entries: list[tuple[str, int, str, str]] = []
    names: dict[int, str] = {}
    for domain in wanted.of_domains(DOMAINS):
        for split in SPLITS:
            path = f"{domain}_{split}.txt"
            root = files.root(path)
            for number, line in enumerate(files.lines(path, root), start=1):
                image, label = _entry(files, root + path, number, line)
                name = image.split("/")[-2]
                if names.setdefault(label, name).casefold() != name.casefold():
                    raise DataError(
                        f"{files.place}: {path}, line {number}: class {label} is {name!r} and {names[label]!r}"
                    )
                entries.append((image, label, split, domain))
    classes = wanted.of_classes([names[label] for label in sorted(names)])
    number_of = {label: classes.index(name) for label, name in names.items() if name in classes}

    def rows() -> Iterator[Row]:
        for domain in wanted.of_domains(DOMAINS):
            own = [entry for entry in entries if entry[3] == domain]
            root = files.root(own[0][0]) if own else ""
            for image, label, split, _ in own:
                if label in number_of:
                    yield Row(root + image, number_of[label], split, domain)  # type: ignore[arg-type]

    yield Images("domainnet", classes, rows())


def _entry(files: Files, path: str, number: int, line: str) -> tuple[str, int]:
    image, _, label = line.rpartition(" ")
    if image.count("/") < 2 or not label.isdecimal():
        raise DataError(
            f"{files.place}: {path}, line {number} is {line[:80]!r}; expected DOMAIN/CLASS/FILE and a class's number"
        )
    return image, int(label)


RECIPE = Recipe(
    name="domainnet",
    title="DomainNet",
    source="http://ai.bu.edu/M3SDA",
    archives=tuple(Archive(f"{domain}.zip") for domain in DOMAINS),
    images=_images,
    folders=("domainnet",),
    layout="DOMAIN/CLASS/*.jpg, beside the lists DOMAIN_train.txt and DOMAIN_test.txt",
    has_domains=True,
    has_classes=True,
    class_sets={"fedbn": FEDBN},
)
