"""A data set as its files hold it, decoded: what the readers return and the benchmarks cut into domains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fednorm.data.cache import Pixels
from fednorm.data.classes import Rows, are_numbers, missing_numbers, renumbered, require_same_names, some
from fednorm.data.domain import Domain, Split
from fednorm.errors import DataError
from fednorm.memory import require_memory

__all__ = ["Rows", "Source", "align_classes", "count_classes", "stack", "to_square"]


@dataclass(frozen=True, eq=False)
class Source:
    """One data set, decoded: the training images' rows come first, the test images' rows after them.

    Attributes:
        name: The data set's name.
        images: uint8, shape (N, 3, S, S).
        labels: int64, shape (N,).
        train: The training images' rows.
        test: The test images' rows.
        files: Each file with its number of rows, in the order of the rows.
        class_names: The classes' names where the files give them.
        domains: The domain of each row, shape (N,), where the data set has several.
        note: What a reader of a table must know about it.
    """

    name: str
    images: Pixels
    labels: Rows
    train: Rows
    test: Rows
    files: tuple[tuple[str, int], ...]
    class_names: tuple[str, ...] = ()
    domains: npt.NDArray[np.str_] | None = None
    note: str = ""

    def where(self, row: int) -> str:
        """Return the file and the row in it that row ``row`` of the arrays came from, for an error."""
        for file, count in self.files:
            if row < count:
                return f"{file}, row {row}"
            row -= count
        return f"{self.name}, row {row}{' past its end' if self.files else ''}"

    def with_note(self, note: str) -> Source:
        """Return this data set with a note, after its own."""
        return replace(self, note=" ".join(part for part in (self.note, note) if part))

    def split_domains(self, wanted: Sequence[str] = (), prefix: str = "") -> tuple[Domain, ...]:
        """Return the data set's domains: itself, or one for each value of its domain column.

        Args:
            wanted: The values to return, in this order; empty for all of them, sorted.
            prefix: Stands before a domain's value in its name.

        Returns:
            Domains over one shared tensor: no pixel is copied.

        Raises:
            DataError: A wanted domain is not there, or a domain lacks training or test images.
        """
        images, labels = torch.from_numpy(self.images), torch.from_numpy(self.labels)

        def domain(name: str, train: Rows, test: Rows) -> Domain:
            for split, rows in (("training", train), ("test", test)):
                if not len(rows):
                    raise DataError(f"Domain {name} of {self.place} has no {split} images; a domain needs both.")
            splits = [Split(images, labels, torch.from_numpy(rows)) for rows in (train, test)]
            return Domain(name, splits[0], splits[1], self.note)

        if self.domains is None and wanted:
            raise DataError(f"{self.place} has no column 'domain', so it has no domain {wanted[0]!r}.")
        if self.domains is None:
            return (domain(self.name, self.train, self.test),)
        there = sorted(set(self.domains.tolist()))
        for name in wanted:
            if name not in there:
                raise DataError(f"{self.place} has no domain {name!r}; its domains: {', '.join(there)}.")
        return tuple(
            domain(
                prefix + name,
                self.train[self.domains[self.train] == name],
                self.test[self.domains[self.test] == name],
            )
            for name in (wanted or there)
        )

    @property
    def place(self) -> str:
        """The folder of its files, or its name, for an error."""
        return str(Path(self.files[0][0]).parent) if self.files else self.name


def align_classes(sources: Sequence[Source]) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """Number the classes of several data sets alike: their names decide.

    Args:
        sources: The data sets that one model is trained on.

    Returns:
        The data sets, with labels numbered as the first that names its classes does; and the sentences that belong
        under a table where a data set without names stands beside one whose names are more than numbers.

    Raises:
        DataError: Two data sets name different classes.
    """
    first = next((source for source in sources if source.class_names), None)
    if first is None:
        return tuple(sources), ()
    aligned, notes = [], []
    for source in sources:
        if source.class_names:
            require_same_names(source.class_names, source.place, first.class_names, first.place)
            labels = renumbered(source.labels, source.class_names, first.class_names)
            aligned.append(replace(source, labels=labels, class_names=first.class_names))
            continue
        aligned.append(source)
        if not are_numbers(first.class_names):
            notes.append(
                f"{source.name} does not name its classes: its labels are taken to mean those of {first.name}."
            )
    return tuple(aligned), tuple(notes)


def count_classes(sources: Sequence[Source]) -> int:
    """Return K, the number of classes of several data sets that one model is trained on.

    Args:
        sources: The data sets; their labels must mean the same (:func:`align_classes`).

    Returns:
        The number of class names where a data set gives them, else the largest label plus 1. Time and memory depend
        on the number of images, not on their labels.

    Raises:
        DataError: Two data sets number their classes differently, a label is outside 0 to K - 1, there is no image,
            or, without class names, labels are missing between 0 and K - 1.
    """
    named = [source for source in sources if source.class_names]
    for other in named[1:]:
        if other.class_names != named[0].class_names:
            raise DataError(f"{other.place} and {named[0].place} number their classes differently.")
    present = sorted({int(label) for source in sources for label in np.unique(source.labels)})
    if not present:
        raise DataError(f"{', '.join(source.name for source in sources)} hold no images.")
    num_classes = len(named[0].class_names) if named else present[-1] + 1
    for source in sources:
        outside = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{source.where(row)}: label {source.labels[row]} is outside 0 to {num_classes - 1}, the "
                f"{num_classes} classes of {named[0].name if named else 'these data sets'}. Number the classes from 0."
            )
    if not named and len(present) < num_classes:
        gaps = some(missing_numbers(present, most=8))
        more = num_classes - len(present) - 8
        raise DataError(
            f"The labels of {', '.join(source.name for source in sources)} go up to {num_classes - 1}, but no image "
            f"has label {gaps}{f', and {more} more' if more > 0 else ''}. Number the classes 0 to K - 1 without gaps, "
            "or write the class names into the Parquet schema's Hugging Face metadata if a class is empty on purpose."
        )
    return num_classes


def to_square(image: Image.Image, size: int) -> Pixels:
    """Return an image as uint8, shape (3, size, size): grey to three channels, resized with Pillow's bilinear filter.

    The aspect ratio is not kept, as in FedBN's preprocessing.
    """
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def stack(images: Iterable[Image.Image], count: int, size: int) -> Pixels:
    """Return ``count`` images as uint8, shape (count, 3, size, size).

    Raises:
        DataError: They would not fit into memory, or there are more or fewer of them.
    """
    # Beside the array stands one image as Pillow resizes it, of 4 bytes a pixel, and as NumPy copies it.
    require_memory(
        (3 * count + 7) * size * size,
        f"{count:,} images of {size} x {size} pixels",
        "Choose a smaller data.image_size, or fewer images.",
        DataError,
    )
    out = np.empty((count, 3, size, size), dtype=np.uint8)
    num_images = 0
    for image in images:
        if num_images < count:
            out[num_images] = to_square(image, size)
        num_images += 1
    if num_images != count:
        raise DataError(f"{count} images were announced and {num_images} are there. The files are corrupt.")
    return out
