"""What a recipe is: which archives a data set is published as, and which images with which labels stand in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy.typing as npt

from fednorm.data.classes import some
from fednorm.data.prepare.files import Files
from fednorm.errors import DataError


@dataclass(frozen=True)
class Archive:
    """A file that a data set is published as.

    Attributes:
        name: What it is called.
        md5: Its MD5 sum as published, 32 hex digits; empty where no official one is known.
    """

    name: str
    md5: str = ""


class Row(NamedTuple):
    """An image of a data set.

    Attributes:
        image: Its file's name among the archives', or its pixels, uint8, shape (H, W) or (H, W, 3).
        label: Its class, 0 to K - 1.
        split: Which images it belongs to.
        domain: Its domain; empty where the data set has one only.
    """

    image: str | npt.NDArray[Any]
    label: int
    split: Literal["train", "test"]
    domain: str = ""


@dataclass(frozen=True)
class Images:
    """A Parquet folder to be written.

    Attributes:
        name: What the folder is called.
        class_names: The classes' names, in the order of the labels.
        rows: Its images; asked for once.
        notes: What was decided where nothing official is known.
    """

    name: str
    class_names: tuple[str, ...]
    rows: Iterable[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """A part of a data set.

    Attributes:
        domains: The domains to keep; empty for all.
        classes: The classes to keep, by name; empty for all.
    """

    domains: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def of_domains(self, known: Collection[str]) -> tuple[str, ...]:
        """Return the domains to keep, in the order of ``known``.

        Raises:
            DataError: One is unknown.
        """
        return _chosen("domain", self.domains, known)

    def of_classes(self, known: Collection[str]) -> tuple[str, ...]:
        """Return the classes to keep, in the order of ``known``.

        Raises:
            DataError: One is unknown.
        """
        return _chosen("class", self.classes, known)


def _chosen(what: str, wanted: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise DataError(f"There is no {what} {some(unknown)}; there are {some(list(known))}. Name some of these.")
    return tuple(name for name in known if not wanted or name in wanted)


@dataclass(frozen=True)
class Recipe:
    """How a data set's archives become Parquet folders.

    Attributes:
        name: What it is called, as the benchmark that reads the folders.
        title: As its authors call it.
        source: Where the archives are published.
        archives: What they are called; each may be unpacked instead, in the folder beside the others.
        images: Reads them.
        folders: The names of the folders that are written.
        layout: What the archives hold, for an error.
        has_domains: Whether ``--domains`` says which of them to take.
        has_classes: Whether ``--classes`` says which of them to take.
        class_sets: Names for published choices of classes.
    """

    name: str
    title: str
    source: str
    archives: tuple[Archive, ...]
    images: Callable[[Files, Wanted], Iterator[Images]]
    folders: tuple[str, ...]
    layout: str
    has_domains: bool = False
    has_classes: bool = False
    class_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def expected(self) -> str:
        """A sentence on what the source folder should hold."""
        names = some([archive.name for archive in self.archives], most=16)
        return f"Expected {names}, packed or unpacked ({self.layout}); published at {self.source}."

    def wanted(self, domains: tuple[str, ...], classes: tuple[str, ...]) -> Wanted:
        """Return the part of the data set that was asked for.

        Raises:
            DataError: It cannot be had in parts of that kind.
        """
        if domains and not self.has_domains:
            raise DataError(f"{self.title} has no domains to choose among. Leave --domains out.")
        if classes and not self.has_classes:
            raise DataError(f"{self.title} is prepared with all of its classes. Leave --classes out.")
        if len(classes) == 1 and classes[0] in self.class_sets:
            classes = self.class_sets[classes[0]]
        return Wanted(domains, classes)

    def unexpected(self, files: Files, reason: str) -> DataError:
        """Return the error of a source that is not laid out as the official archives are."""
        return DataError(f"{files.place}: {reason}. {self.expected}")


def archive_paths(source: Path, archives: Iterable[Archive]) -> list[tuple[Path, Archive]]:
    """Return the archives that a folder holds, or the one that ``source`` is itself."""
    known = {archive.name.lower(): archive for archive in archives}
    if source.is_file():
        return [(source, known.get(source.name.lower(), Archive(source.name)))]
    there = sorted(path for path in source.iterdir() if path.name.lower() in known and path.is_file())
    return [(path, known[path.name.lower()]) for path in there]
