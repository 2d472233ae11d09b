"""Several clients' updates as one: each tensor with an axis of clients in front, checked and averaged at once.

A cohort's clients send rows of one stack. A :class:`RowRecord` is an ``ArrayRecord`` like any other to whoever reads
it; our own strategies see the stack behind it, and need no loop over clients and tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from flwr.app import Array
from torch import Tensor

from fednorm.federation.plan import NormPlan
from fednorm.federation.wire import LazyRecord, MemoryArray
from fednorm.roles import Kind

NEVER_NEGATIVE = frozenset({Kind.VAR, Kind.QUADRATIC, Kind.DEVIATION})


class Stack:
    """The tensors of K clients' updates, on the CPU; nobody writes to them.

    Args:
        tensors: By key of the plan, in its order, shape (K, ...).
        count: K.

    Attributes:
        nbytes: Bytes of one client's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], count: int) -> None:
        self.tensors, self.count = tensors, count
        self.nbytes = sum(tensor[0].nbytes for tensor in tensors.values())
        self._fits: tuple[object, list[bool]] | None = None
        self._parts: dict[tuple[str, ...], Stack] = {}
        self._norms: tuple[Mapping[str, Tensor], list[float]] | None = None

    def part(self, keys: Sequence[str]) -> Stack:
        """Return the stack of some of the tensors, in the order of the keys; made once."""
        names = tuple(keys)
        if names not in self._parts:
            self._parts[names] = Stack({key: self.tensors[key] for key in names}, self.count)
        return self._parts[names]

    def fits(self, keys: Sequence[str], plan: NormPlan) -> list[bool]:
        """Return whose tensors are those of the keys, of the plan's forms, finite, and not negative where none is."""
        asked = (tuple(keys), id(plan))
        if self._fits is None or self._fits[0] != asked:
            self._fits = (asked, self._checked(plan).tolist() if self._is_of(keys, plan) else [False] * self.count)
        return self._fits[1]

    def _is_of(self, keys: Sequence[str], plan: NormPlan) -> bool:
        forms = [(plan.by_key[key].shape, plan.by_key[key].dtype) for key in keys]
        own = [(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in self.tensors.values()]
        return tuple(self.tensors) == tuple(keys) and own == forms

    def _checked(self, plan: NormPlan) -> Tensor:
        sound = torch.ones(self.count, dtype=torch.bool)
        for key, tensor in self.tensors.items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            flat = tensor.reshape(self.count, -1)
            finite = flat.sum(1).isfinite()  # a finite sum proves it in one cheap pass
            sound &= finite if finite.all() else flat.isfinite().all(1)
            if plan.by_key[key].kind in NEVER_NEGATIVE:
                sound &= ~(flat < 0).any(1)
        return sound

    def rows(self, key: str, numbers: Sequence[int]) -> Tensor:
        """Return one tensor of some of the clients, shape (k, ...), in memory of its own."""
        return self.tensors[key].clone() if list(numbers) == list(range(self.count)) else self.tensors[key][numbers]

    def norms(self, old: Mapping[str, Tensor]) -> list[float]:
        """Return how far each client has gone from what all of them were sent, as of ``update_norm``.

        It is not finite where single precision does not suffice.
        """
        if self._norms is None or self._norms[0] is not old:
            total = torch.zeros(self.count, dtype=torch.float64)
            for key, tensor in self.tensors.items():
                if key in old and tensor.is_floating_point() and tensor.numel():
                    total += (tensor - old[key]).reshape(self.count, -1).square().sum(1)
            self._norms = (old, total.sqrt().tolist())
        return self._norms[1]


class StackRow(Mapping[str, Tensor]):
    """One client's tensors of a stack."""

    def __init__(self, stack: Stack, number: int) -> None:
        self.stack, self.number = stack, number

    def __getitem__(self, key: str) -> Tensor:
        """Return a tensor, which must not be written to."""
        return self.stack.tensors[key][self.number]

    def __iter__(self) -> Iterator[str]:
        """Yield the keys."""
        return iter(self.stack.tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.stack.tensors)


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
