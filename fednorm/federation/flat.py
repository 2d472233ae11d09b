"""A small model's tensors as one vector: what is done to each of them in turn costs more than the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

FLAT = 2**17
"""Values up to which a model is small; a larger one's tensors are not copied for it."""


def flattened(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return all floating-point values one after the other, in the order of the tensors and of their values.

    None where there are none, more than :data:`FLAT`, or some that are not of float32.
    """
    floats, count = [], 0
    for tensor in tensors.values():
        if tensor.dtype is torch.float32:
            count += tensor.numel()
            if count > FLAT:
                return None
            floats.append(tensor.reshape(-1))
        elif tensor.is_floating_point():
            return None
    return torch.cat(floats) if floats else None


def unflattened(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a vector that :func:`flattened` made.

    Args:
        vector: The vector.
        like: Tensors with the same names, shapes and layouts in memory; those that are no floats are left out.
    """
    tensors, at = dict[str, Tensor](), 0
    for key, tensor in like.items():
        if tensor.is_floating_point():
            part = vector[at : at + tensor.numel()].view(tensor.shape)
            tensors[key] = torch.empty_like(tensor).copy_(part)
            at += tensor.numel()
    return tensors


def values_of(tensors: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
    """Return the values of some tensors one after the other, float32; keys that are not there are left out."""
    if isinstance(tensors, FlatTensors):
        return tensors.flat[tensors.layout.chosen(keys)]
    parts = [tensors[key].reshape(-1).float() for key in keys if key in tensors]
    return torch.cat(parts) if parts else torch.empty(0)


class FlatLayout:
    """Where in a vector the floating-point values of some tensors stand, one tensor after the other.

    Args:
        tensors: The tensors by key: those of other types are in no vector.

    Attributes:
        forms: Shape and type of each, by key.
        length: Values of the vector.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.forms = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        self._places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self.length = 0
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                self._places[key] = self.length, tensor.numel(), tuple(tensor.shape)
                self.length += tensor.numel()
        self._fitting: tuple[object, object, bool] = (None, None, False)
        self._chosen: tuple[Sequence[str], Tensor] = ((), torch.zeros(0, dtype=torch.int64))
        self._some: tuple[Sequence[str], tuple[FlatLayout, Tensor] | None] = ((), None)

    def part(self, vector: Tensor, key: str) -> Tensor | None:
        """Return a tensor as a part of a vector; None for one that is in none."""
        place = self._places.get(key)
        if place is None:
            return None
        start, count, shape = place
        return vector[start : start + count].view(shape)

    def holds(self, key: str) -> bool:
        """Return whether a tensor is in the vector."""
        return key in self._places

    def part_of_each(self, vectors: Tensor, key: str) -> Tensor:
        """Return a tensor, which is in the vectors, of each of them: shape (k, ...) of vectors of shape (k, length)."""
        start, count, shape = self._places[key]
        return vectors[:, start : start + count].reshape(-1, *shape)

    def some(self, keys: Sequence[str]) -> tuple[FlatLayout, Tensor] | None:
        """Return the layout of some tensors' own vector, and where its values stand in this one's, int64.

        None where not all of them are in this one; found once for the same keys.
        """
        if self._some[0] is not keys:
            held = all(map(self.holds, keys))
            like = {key: torch.empty(self.forms[key][0], device="meta") for key in keys} if held else {}
            self._some = keys, (FlatLayout(like), self._rows(keys)) if held else None
        return self._some[1]

    def fits(self, keys: Sequence[str], forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bool:
        """Return whether the tensors are those of some keys, in order, of their forms; looked at once."""
        if self._fitting[0] is not keys or self._fitting[1] is not forms:
            fit = list(self.forms.items()) == [(key, forms[key]) for key in keys if key in forms]
            self._fitting = keys, forms, fit and len(self.forms) == len(keys)
        return self._fitting[2]

    def chosen(self, keys: Sequence[str]) -> Tensor:
        """Return where in a vector the values of some tensors stand, int64; found once for the same keys."""
        if self._chosen[0] is not keys:
            self._chosen = keys, self._rows(keys)
        return self._chosen[1]

    def _rows(self, keys: Sequence[str]) -> Tensor:
        places = [self._places[key] for key in keys if key in self._places]
        rows = [torch.arange(start, start + count) for start, count, _ in places]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


class FlatTensors(Mapping[str, Tensor]):
    """Tensors of which the floating-point ones are parts of one vector, each made when it is asked for.

    Attributes:
        flat: What :func:`flattened` makes of them.
        layout: Where they stand in it.
    """

    __slots__ = ("_others", "flat", "layout")

    def __init__(self, flat: Tensor, layout: FlatLayout, others: Mapping[str, Tensor]) -> None:
        """Take the vector, and the tensors that are not in it."""
        self.flat, self.layout, self._others = flat, layout, others

    def __contains__(self, key: object) -> bool:
        """Return whether there is such a tensor, which is not made for that."""
        return key in self.layout.forms

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor, which must not be written to."""
        part = self.layout.part(self.flat, key)
        return self._others[key] if part is None else part

    def some(self, keys: Sequence[str]) -> Mapping[str, Tensor]:
        """Return some of the tensors, in memory of their own where all are parts of the vector."""
        some = self.layout.some(keys)
        if some is None:
            return {key: self[key] for key in keys}
        layout, rows = some
        return FlatTensors(self.flat[rows], layout, {})

    def __iter__(self) -> Iterator[str]:
        """Yield the keys."""
        return iter(self.layout.forms)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.layout.forms)


class FlatCopy:
    """Copies the tensors of one small model, which clients take turns on, each time into a vector of its own.

    Args:
        tensors: The model's own, on the CPU, those with floating-point values of float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._layout = FlatLayout(tensors)
        self._others = {key: tensor for key, tensor in tensors.items() if not tensor.is_floating_point()}
        floats = {key: tensor for key, tensor in tensors.items() if key not in self._others}
        self._floats = list(floats.values())
        # Laid beside each other where they always are: to cut a new vector into parts takes longer than to copy one.
        self._beside = torch.empty(self._layout.length)
        self._parts = [self._beside[:0] if part is None else part for part in map(self._part, floats)]

    def _part(self, key: str) -> Tensor | None:
        return self._layout.part(self._beside, key)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FlatCopy | None:
        """Return what copies some tensors; None where they make no vector, or are elsewhere."""
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        small = 0 < sum(tensor.numel() for tensor in floats) <= FLAT
        plain = all(tensor.dtype is torch.float32 for tensor in floats)
        return cls(tensors) if small and plain and all(tensor.is_cpu for tensor in tensors.values()) else None

    @torch.no_grad()
    def __call__(self) -> FlatTensors:
        """Return copies of the tensors as they are now."""
        torch._foreach_copy_(self._parts, self._floats)
        others = {key: tensor.clone() for key, tensor in self._others.items()}
        return FlatTensors(self._beside.clone(), self._layout, others)
