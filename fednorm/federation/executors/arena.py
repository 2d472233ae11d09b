"""Memory that processes share, with records of tensors in it.

A parcel is a number of Flower's records laid into an arena: each tensor at an offset of its own, and after them a short
header, pickled, that says what lies where. No tensor is pickled, and a layout that a header has named before goes by a
number. Nothing here has a name in the file system: memory goes with the last process that has it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import pickle
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from torch import Tensor

from fednorm.federation.wire import pack, tensor_of

Record = ArrayRecord | MetricRecord | ConfigRecord
Named = tuple[str, Record]

_ALIGNED = 64
"""Bytes at whose multiples tensors begin, as PyTorch's own do."""

_SMALL = 2**17
"""Bytes of a record below which its copied tensors share one piece of memory: whoever keeps one keeps them all."""


class Place(NamedTuple):
    """Where a tensor lies from its record's beginning on, in bytes, and what it looks like."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int


class Layout(NamedTuple):
    """Where a record's tensors lie."""

    places: tuple[Place, ...]
    nbytes: int


class Parcel(NamedTuple):
    """Where a parcel's header lies in its arena; that is all that goes through a pipe."""

    begin: int
    nbytes: int


class Arena:
    """Shared bytes, as many as were needed so far; a process that is forked has them too, and sees them grow."""

    def __init__(self) -> None:
        self._file = os.memfd_create("fednorm")  # Linux
        self._close = weakref.finalize(self, os.close, self._file)
        self._map: mmap.mmap | None = None
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def room(self, nbytes: int) -> bool:
        """Make so many bytes accessible; whether they have moved, so that views of them are of the old place."""
        if nbytes <= len(self.bytes):
            return False
        size = max(os.fstat(self._file).st_size, 1)
        while size < nbytes:
            size *= 2
        os.ftruncate(self._file, size)
        self._map = mmap.mmap(self._file, size)  # the old one goes with the last view of it
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        return True

    def close(self) -> None:
        """Give this process's part in the memory back, once the last view of it is gone."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map = None
        self._close()


class Sender:
    """Lays parcels into an arena, one at a time: each takes the place of the one before."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._numbers: dict[tuple[Any, ...], tuple[int, Layout]] = {}
        self._views: dict[tuple[int, int], list[Tensor]] = {}

    def send(self, records: Iterable[Named], about: object = None) -> Parcel:
        """Lay records into the arena.

        Args:
            records: Each with a name.
            about: Anything small that can be pickled.
        """
        lines: list[tuple[str, object, object]] = []
        new: list[tuple[int, Layout]] = []
        filled: list[tuple[int, int, Layout, list[Tensor]]] = []
        end = 0
        for name, record in records:
            if not isinstance(record, ArrayRecord):
                lines.append((name, type(record) is ConfigRecord, dict(record)))
                continue
            tensors = [_dense(tensor_of(array)) for array in record.values()]
            number, layout = self._layout(record, tensors, new)
            lines.append((name, number, end))
            filled.append((number, end, layout, tensors))
            end += layout.nbytes
        header = pickle.dumps((about, new, lines), protocol=pickle.HIGHEST_PROTOCOL)
        if self._arena.room(end + len(header)):
            self._views.clear()
        for number, begin, layout, tensors in filled:
            if tensors:
                torch._foreach_copy_(self._targets(number, begin, layout), tensors)
        self._arena.bytes[end : end + len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        return Parcel(end, len(header))

    def _layout(self, record: ArrayRecord, tensors: list[Tensor], new: list[tuple[int, Layout]]) -> tuple[int, Layout]:
        forms = tuple((key, t.dtype, t.shape, t.stride()) for key, t in zip(record, tensors, strict=True))
        if forms not in self._numbers:
            self._numbers[forms] = len(self._numbers), _laid_out(record, tensors)
            new.append(self._numbers[forms])
        return self._numbers[forms]

    def _targets(self, number: int, begin: int, layout: Layout) -> list[Tensor]:
        if (number, begin) not in self._views:
            if len(self._views) > 64:  # parcels whose parts are never alike
                self._views.clear()
            self._views[number, begin] = _views(self._arena.bytes, begin, layout)
        return self._views[number, begin]


class Receiver:
    """Reads the parcels of one sender."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._layouts: dict[int, Layout] = {}

    def receive(self, parcel: Parcel, *, copy: bool) -> tuple[Any, list[Named]]:
        """Return what a parcel is about, and its records.

        Args:
            parcel: As the sender returned it.
            copy: Whether tensors get memory of their own; else they are gone with the sender's next parcel.
        """
        end = parcel.begin + parcel.nbytes
        self._arena.room(end)
        about, new, lines = pickle.loads(self._arena.bytes[parcel.begin : end].numpy().tobytes())
        self._layouts.update(new)
        records: list[Named] = []
        for name, what, rest in lines:
            if isinstance(what, bool):
                records.append((name, (ConfigRecord if what else MetricRecord)(rest)))
            else:
                records.append((name, pack(_tensors(self._arena.bytes, rest, self._layouts[what], copy=copy))))
        return about, records


def _dense(tensor: Tensor) -> Tensor:
    """Return a tensor whose values fill its memory, in whatever order: with its strides it can be made anew."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"a tensor is laid out as {tensor.layout}; expected a dense one")
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.contiguous()


def _laid_out(record: ArrayRecord, tensors: Iterable[Tensor]) -> Layout:
    places, end = [], 0
    for key, tensor in zip(record, tensors, strict=True):
        places.append(Place(key, tensor.dtype, tuple(tensor.shape), tensor.stride(), end, tensor.nbytes))
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return Layout(tuple(places), end)


def _tensors(memory: Tensor, begin: int, layout: Layout, *, copy: bool) -> dict[str, Tensor]:
    """Return a record's tensors by key."""
    if copy and layout.nbytes < _SMALL:
        memory, begin, copy = memory[begin : begin + layout.nbytes].clone(), 0, False
    keys = [place.key for place in layout.places]
    views = _views(memory, begin, layout)
    return dict(zip(keys, [view.clone() for view in views] if copy else views, strict=True))


def _views(memory: Tensor, begin: int, layout: Layout) -> list[Tensor]:
    """Return a record's tensors where they lie; what they begin at is a multiple of what any value takes."""
    kinds = {place.dtype for place in layout.places}
    values = {dtype: memory.view(dtype) for dtype in kinds}
    return [
        values[place.dtype].as_strided(place.shape, place.stride, (begin + place.offset) // place.dtype.itemsize)
        for place in layout.places
    ]
