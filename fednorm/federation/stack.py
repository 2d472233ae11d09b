"""Several clients' updates as one: each tensor with an axis of clients in front, checked and averaged at once.

A cohort's clients send rows of one stack. A :class:`RowRecord` is an ``ArrayRecord`` like any other to whoever reads
it; our own strategies see the stack behind it, and need no loop over clients and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from types import MappingProxyType

import torch
from flwr.app import Array
from torch import Tensor

from fednorm.federation.flat import FlatLayout, FlatTensors
from fednorm.federation.plan import NormPlan
from fednorm.federation.wire import LazyRecord, MemoryArray
from fednorm.roles import NEVER_NEGATIVE

CACHED = 2**16
"""Values of some rows that are worked on at a time."""

FEW = 2**10
"""Values of one client's tensor up to which it is laid beside others, to be worked on together."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some floating-point tensors of a stack as one matrix.

    Attributes:
        keys: Of the tensors, whose values stand one after the other in each row.
        lengths: How many values each has.
        rows: A row a client.
    """

    keys: tuple[str, ...]
    lengths: tuple[int, ...]
    rows: Tensor


class Stack:
    """The tensors of K clients' updates, on the CPU; nobody writes to them.

    Args:
        tensors: By key of the plan, in its order, shape (K, ...).
        count: K.
        origin: What all of them were sent, by key; empty where that is not known.

    Attributes:
        nbytes: Bytes of one client's.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], count: int, origin: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.tensors, self.count, self._origin = tensors, count, origin
        self.nbytes = sum(tensor[0].nbytes for tensor in tensors.values())
        self._fits: tuple[NormPlan, Sequence[str], list[bool]] | None = None
        self._parts: dict[tuple[str, ...], Stack] = {}
        self._norms: tuple[Mapping[str, Tensor], list[float]] | None = None

    @cached_property
    def blocks(self) -> list[Block]:
        """All floating-point tensors: each large one by itself, small ones of one type together."""
        groups: dict[object, list[str]] = {}
        for key, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.numel():
                few = tensor.numel() <= FEW * self.count
                groups.setdefault(tensor.dtype if few else key, []).append(key)
        blocks = []
        for keys in groups.values():
            flat = [self.tensors[key].reshape(self.count, -1) for key in keys]
            lengths = tuple(tensor.shape[1] for tensor in flat)
            blocks.append(Block(tuple(keys), lengths, torch.cat(flat, 1) if len(flat) > 1 else flat[0]))
        return blocks

    def part(self, keys: Sequence[str]) -> Stack:
        """Return the stack of some of the tensors, in the order of the keys; made once."""
        names = tuple(keys)
        if names not in self._parts:
            self._parts[names] = Stack({key: self.tensors[key] for key in names}, self.count)
        return self._parts[names]

    def fits(self, keys: Sequence[str], plan: NormPlan) -> list[bool]:
        """Return whose tensors are those of the keys, of the plan's forms, finite, and not negative where none is."""
        if self._fits is None or self._fits[0] is not plan or self._fits[1] != keys:
            fit = self._checked(plan).tolist() if self._is_of(keys, plan) else [False] * self.count
            self._fits = (plan, keys, fit)
        return self._fits[2]

    def _is_of(self, keys: Sequence[str], plan: NormPlan) -> bool:
        forms = [(plan.by_key[key].shape, plan.by_key[key].dtype) for key in keys]
        own = [(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in self.tensors.values()]
        return tuple(self.tensors) == tuple(keys) and own == forms

    def _checked(self, plan: NormPlan) -> Tensor:
        sound = self._finite()
        for key, tensor in self.tensors.items():
            if plan.by_key[key].kind in NEVER_NEGATIVE and tensor.numel():
                sound &= ~(tensor.reshape(self.count, -1) < 0).any(1)
        return sound

    def _finite(self) -> Tensor:
        """Return of which clients every value of every float tensor is finite, bool, shape (K,)."""
        finite = torch.ones(self.count, dtype=torch.bool)
        # Who has gone a finite way from finite values is at finite ones.
        proven = bool(self._origin) and all(map(math.isfinite, self.norms(self._origin)))
        for key, tensor in self.tensors.items():
            if tensor.is_floating_point() and tensor.numel() and not (proven and key in self._origin):
                flat = tensor.reshape(self.count, -1)
                sums = flat.sum(1).isfinite()  # a finite sum proves it in one cheap pass
                finite &= sums if sums.all() else flat.isfinite().all(1)
        return finite

    def rows(self, key: str, numbers: Sequence[int]) -> Tensor:
        """Return one tensor of some of the clients, shape (k, ...), in memory of its own."""
        return self.tensors[key].clone() if list(numbers) == list(range(self.count)) else self.tensors[key][numbers]

    def norms(self, old: Mapping[str, Tensor]) -> list[float]:
        """Return how far each client has gone from what all of them were sent, as of ``update_norm``.

        It is not finite where single precision does not suffice.
        """
        if self._norms and old is not self._norms[0] and _same(old, self._norms[0]):
            self._norms = (old, self._norms[1])
        if self._norms is None or self._norms[0] is not old:
            total = torch.zeros(self.count, dtype=torch.float64)
            for block in self.blocks:
                rows, before = _known(block, old)
                if before is not None:
                    parts = [torch.linalg.vector_norm(part - before, dim=1) for part in in_cache(rows)]
                    total += torch.cat(parts).double().square()
            self._norms = (old, total.sqrt().tolist())
        return self._norms[1]


class StackRow(Mapping[str, Tensor]):
    """One client's tensors of a stack."""

    __slots__ = ("number", "stack")

    def __init__(self, stack: Stack, number: int) -> None:
        self.stack, self.number = stack, number

    def __contains__(self, key: object) -> bool:
        """Return whether there is such a tensor, which is not taken out of the stack for that."""
        return key in self.stack.tensors

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor, which must not be written to."""
        return self.stack.tensors[key][self.number]

    def __iter__(self) -> Iterator[str]:
        """Yield the keys."""
        return iter(self.stack.tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.stack.tensors)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(tensor is other[key] for key, tensor in one.items())


def _known(block: Block, old: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return a block's rows and the old tensors beside them, flat: those of both."""
    own = [key in old for key in block.keys]
    before = [old[key].reshape(-1) for key in block.keys if key in old]
    if not before:
        return block.rows, None
    if all(own):
        return block.rows, torch.cat(before)
    parts = torch.split(block.rows, list(block.lengths), 1)
    return torch.cat([part for part, is_known in zip(parts, own, strict=True) if is_known], 1), torch.cat(before)


def in_cache(tensor: Tensor) -> list[Tensor]:
    """Return rows of a stack's tensor, so many at a time that the processor's cache holds what is made of them."""
    return list(torch.split(tensor, max(1, CACHED * len(tensor) // max(tensor.numel(), 1))))


def some_of(tensors: Mapping[str, Tensor], keys: Sequence[str]) -> Mapping[str, Tensor]:
    """Return some of a client's tensors; of a row, a row of a smaller stack, so that the whole one can go."""
    if isinstance(tensors, StackRow):
        return StackRow(tensors.stack.part(keys), tensors.number)
    if isinstance(tensors, FlatTensors):
        return tensors.some(keys)
    return {key: tensors[key] for key in keys}


class Gathered:
    """Several clients' tensors; rows of one stack, and parts of vectors laid out alike, are looked up together.

    Args:
        clients: Each one's, in order.
    """

    def __init__(self, clients: Sequence[Mapping[str, Tensor]]) -> None:
        self._groups = [_Group(shared, list(own)) for shared, own in groupby(clients, key=_shared)]

    def have(self, key: str) -> bool:
        """Return whether every client has a tensor."""
        return all(group.have(key) for group in self._groups)

    def of_each(self, key: str) -> Tensor:
        """Return one tensor of all clients, shape (k, ...)."""
        parts = [group.of_each(key) for group in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shared(tensors: Mapping[str, Tensor]) -> Stack | FlatLayout | None:
    """Return what a client's tensors share with others': a stack, or where they stand in a vector."""
    if isinstance(tensors, StackRow):
        return tensors.stack
    return tensors.layout if isinstance(tensors, FlatTensors) else None


class _Group:
    """Clients in a row whose tensors share something, or nothing."""

    def __init__(self, shared: Stack | FlatLayout | None, own: Sequence[Mapping[str, Tensor]]) -> None:
        self._shared, self._own = shared, own
        self._numbers = [row.number for row in own if isinstance(row, StackRow)]
        flats = [tensors.flat for tensors in own if isinstance(tensors, FlatTensors)]
        self._vectors = torch.stack(flats) if flats else torch.empty(0)

    def have(self, key: str) -> bool:
        if isinstance(self._shared, Stack):
            return key in self._shared.tensors
        return all(key in tensors for tensors in self._own)

    def of_each(self, key: str) -> Tensor:
        if isinstance(self._shared, Stack):
            return self._shared.rows(key, self._numbers)
        if self._shared is not None and self._shared.holds(key):
            return self._shared.part_of_each(self._vectors, key)
        return torch.stack([tensors[key] for tensors in self._own])


def of_each(clients: Sequence[Mapping[str, Tensor]], key: str) -> Tensor:
    """Return one tensor of several clients, shape (k, ...); rows of one stack are looked up together."""
    return Gathered(clients).of_each(key)


class _Arrays(Mapping[str, Array]):
    """The tensors of a row as Flower's arrays, each made when it is asked for."""

    def __init__(self, row: StackRow) -> None:
        self._row = row

    def __getitem__(self, key: str) -> Array:
        return MemoryArray(self._row[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


class RowRecord(LazyRecord):
    """An ``ArrayRecord`` of one row of a stack; it must not be written to."""

    def __init__(self, row: StackRow) -> None:
        super().__init__(_Arrays(row))
        self.__dict__["row"] = row

    @property
    def row(self) -> StackRow:
        """Return the row."""
        row: StackRow = self.__dict__["row"]
        return row


# As for any record of Flower's: its name is written down where it is serialized.
RowRecord.__qualname__ = LazyRecord.__qualname__
