"""Classes are what their names say: labels are numbered anew where two files number the same names differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fednorm.errors import DataError

Rows = npt.NDArray[np.int64]


def renumbered(labels: Rows, names: Sequence[str], reference: Sequence[str]) -> Rows:
    """Return labels by the numbers that ``reference`` gives their classes' names.

    Args:
        labels: 0 to K - 1, shape (N,).
        names: The name of each class as ``labels`` number it; each is in ``reference``.
        reference: The names in the order that counts.

    Returns:
        Labels of the same names, shape (N,); the array itself where nothing changes.
    """
    if tuple(names) == tuple(reference)[: len(names)]:
        return labels
    number = {name: k for k, name in enumerate(reference)}
    return np.array([number[name] for name in names], dtype=np.int64)[labels]


def require_same_names(names: Sequence[str], here: str, reference: Sequence[str], there: str) -> None:
    """Refuse two sets of class names that differ; their order may.

    Raises:
        DataError: A name is in one of them only; the message names it.
    """
    only_here, only_there = set(names) - set(reference), set(reference) - set(names)
    if only_here or only_there:
        differ = [
            f"{some(sorted(names), repr)} only in {place}"
            for names, place in ((only_there, there), (only_here, here))
            if names
        ]
        raise DataError(
            f"{here} names {len(names)} classes and {there} names {len(reference)}, and they are not the same: "
            f"{', '.join(differ)}. All need the same class names, in any order. Rename, add or remove classes."
        )


def in_natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return names sorted, as numbers where all are whole numbers: ``2`` before ``10``."""
    distinct = set(names)
    if all(name.isascii() and name.isdecimal() and len(name) < 19 for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def are_numbers(names: Sequence[str]) -> bool:
    """Return whether the names say no more than the labels: ``0`` to ``K - 1``."""
    return list(names) == [str(k) for k in range(len(names))]


def missing_numbers(present: Sequence[int], most: int) -> list[int]:
    """Return the first whole numbers from 0 that are not in ``present`` (sorted, distinct), however large those are."""
    missing: list[int] = []
    expected = 0
    for value in present:
        missing.extend(range(expected, min(value, expected + most - len(missing))))
        if len(missing) >= most:
            break
        expected = value + 1
    return missing


def some(values: Sequence[object], form: Callable[[object], str] = str, most: int = 8) -> str:
    """Return a few values as text."""
    shown = ", ".join(form(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown}, and {len(values) - most} more"
