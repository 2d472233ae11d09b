"""Many clients that cost nothing until one of them is asked for: rows of a few splits, in one array for all.

A client made of Python objects takes some two kilobytes before it has done anything; here it takes the numbers of its
images. A federation of up to :data:`~fednorm.data.federation.SMALL` clients has a plain tuple of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fednorm.data.domain import Client, Split
from fednorm.data.scaling import Scaling

if TYPE_CHECKING:
    from hashlib import _Hash

Numbers = NDArray[np.int64]

SPLITS = ("train", "validation", "test")

_AT_ONCE = 1024
"""Clients whose first and last images are read at a time."""


@dataclass(frozen=True, eq=False)
class Share:
    """One split of every client of a domain.

    Attributes:
        whole: The split whose rows they hold: ``whole.index`` has the first client's, then the second's, and so on.
        ends: Where each client's rows end, int64, shape (n,).
    """

    whole: Split
    ends: Numbers

    @classmethod
    def of(cls, split: Split, shares: Sequence[Numbers]) -> Share:
        """Return what clients hold of a split.

        Args:
            split: The split.
            shares: Which rows of it each client holds.
        """
        ends = np.cumsum([len(rows) for rows in shares], dtype=np.int64)
        rows = torch.from_numpy(np.concatenate(shares)) if shares else torch.empty(0, dtype=torch.int64)
        return cls(replace(split, index=split.index[rows]), ends)

    @property
    def counts(self) -> Numbers:
        """The number of rows of each client."""
        return np.diff(self.ends, prepend=0)

    def of_client(self, number: int) -> Split:
        """Return one client's split; the arrays stay the same objects."""
        start = int(self.ends[number - 1]) if number else 0
        return replace(self.whole, index=self.whole.index[start : int(self.ends[number])])


@dataclass(frozen=True, eq=False)
class Group:
    """The clients of one domain.

    Attributes:
        domain: Its name.
        train: Their training images.
        validation: Their images held back.
        test: Their shares of the test images.
        held_out: Whether they only evaluate.
    """

    domain: str
    train: Share
    validation: Share
    test: Share
    held_out: bool = False

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.train.ends)

    def client(self, number: int, partition_id: int) -> Client:
        """Return one of them."""
        train, validation, test = (share.of_client(number) for share in (self.train, self.validation, self.test))
        return Client(partition_id, self.domain, train, validation, test, self.held_out)


@dataclass(frozen=True, eq=False)
class Clients(Sequence[Client]):
    """Clients by partition id, each made when it is asked for.

    Attributes:
        groups: The clients of each domain, in the order of partition ids.
    """

    groups: tuple[Group, ...]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @overload
    def __getitem__(self, number: int) -> Client: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Client]: ...

    def __getitem__(self, number: int | slice) -> Client | Sequence[Client]:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(len(self))[number])
        partition_id = range(len(self))[number]  # refuses what is out of range, and counts from the end
        first = 0
        for group in self.groups:
            if partition_id < first + len(group):
                return group.client(partition_id - first, partition_id)
            first += len(group)
        raise IndexError(number)

    def __iter__(self) -> Iterator[Client]:
        partition_id = 0
        for group in self.groups:
            for number in range(len(group)):
                yield group.client(number, partition_id)
                partition_id += 1

    def rescaled(self, scaling_of: Callable[[str], Scaling]) -> Clients:
        """Return the clients with their images scaled as their domain has it."""

        def scaled(group: Group) -> Group:
            shares: dict[str, Any] = {}
            for name in SPLITS:
                share: Share = getattr(group, name)
                shares[name] = replace(share, whole=replace(share.whole, scaling=scaling_of(group.domain)))
            return replace(group, **shares)

        return Clients(tuple(map(scaled, self.groups)))


@dataclass(frozen=True, eq=False)
class Counts:
    """How many images each client has, in arrays by partition id.

    Attributes:
        domains: The domains' names.
        domain: Each client's place among them, int64.
        held_out: Whether it never trains.
        train: Its training images, int64; ``validation`` and ``test`` likewise.
    """

    domains: tuple[str, ...]
    domain: Numbers
    held_out: NDArray[np.bool_]
    train: Numbers
    validation: Numbers
    test: Numbers

    @classmethod
    def of(cls, clients: Sequence[Client]) -> Counts:
        """Count the images of clients."""
        if isinstance(clients, Clients):
            groups = [(group.domain, group.held_out, len(group)) for group in clients.groups]
            splits = {
                name: np.concatenate(
                    [np.empty(0, np.int64), *(getattr(group, name).counts for group in clients.groups)]
                )
                for name in SPLITS
            }
        else:
            groups = [(client.domain, client.held_out, 1) for client in clients]
            splits = {name: np.array([len(getattr(c, name)) for c in clients], dtype=np.int64) for name in SPLITS}
        places = {domain: place for place, domain in enumerate(dict.fromkeys(domain for domain, _, _ in groups))}
        sizes = [size for _, _, size in groups]
        domain = np.repeat(np.array([places[name] for name, _, _ in groups], dtype=np.int64), sizes)
        held_out = np.repeat(np.array([out for _, out, _ in groups], dtype=np.bool_), sizes)
        return cls(tuple(places), domain, held_out, splits["train"], splits["validation"], splits["test"])

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.domain)

    @property
    def trains(self) -> NDArray[np.bool_]:
        """Whether each client trains: it is not held out and has training images."""
        return ~self.held_out & (self.train > 0)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the first partition id, and the one after the last, of clients in a row of one domain and kind."""
        kinds = self.domain * 2 + self.held_out
        starts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(self)] if len(self) else [0]
        yield from pairwise(starts)


def digest_of_clients(clients: Iterable[Client]) -> str:
    """Return SHA-256 of rows, labels and some pixels of every client, 16 hex digits (``Federation.digest``)."""
    digest = hashlib.sha256()
    if isinstance(clients, Clients):
        first = 0
        for group in clients.groups:
            _add_group(digest, group, first)
            first += len(group)
    else:
        for client in clients:
            for name in SPLITS:
                _add_split(digest, client, name)
    return digest.hexdigest()[:16]


def _header(partition_id: int, domain: str, held_out: bool, name: str, count: int) -> bytes:
    return f"{partition_id}|{domain}|{held_out}|{name}|{count}".encode()


def _add_split(digest: _Hash, client: Client, name: str) -> None:
    split: Split = getattr(client, name)
    digest.update(_header(client.partition_id, client.domain, client.held_out, name, len(split)))
    for numbers in (split.index, split.targets):
        digest.update(numbers.cpu().numpy().astype("<i8").tobytes())
    if len(split):
        digest.update(split.batch(torch.tensor([0, len(split) - 1]))[0].cpu().numpy().tobytes())
    digest.update(split.content.encode())


def _add_group(digest: _Hash, group: Group, first: int) -> None:
    """Add what :func:`_add_split` adds for each client of a group, with arrays that are read for many at once."""
    arrays = {name: _Arrays(getattr(group, name)) for name in SPLITS}
    for start in range(0, len(group), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(group))
        ends = {name: array.ends_of(start, stop) for name, array in arrays.items()}
        for number in range(start, stop):
            for name in SPLITS:
                array, (low, high) = arrays[name], arrays[name].bounds(number)
                digest.update(_header(first + number, group.domain, group.held_out, name, high - low))
                digest.update(array.index[low:high].tobytes())
                digest.update(array.targets[low:high].tobytes())
                if high > low:
                    digest.update(ends[name][number - start].tobytes())
                digest.update(array.content)


class _Arrays:
    """A share's rows and labels as NumPy arrays."""

    def __init__(self, share: Share) -> None:
        self._share, self._starts = share, np.concatenate([np.zeros(1, np.int64), share.ends])
        self.index = share.whole.index.cpu().numpy().astype("<i8")
        self.targets = share.whole.targets.cpu().numpy().astype("<i8")
        self.content = share.whole.content.encode()

    def bounds(self, number: int) -> tuple[int, int]:
        return int(self._starts[number]), int(self._starts[number + 1])

    def ends_of(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the first and the last image of some clients, shape (n, 2, 3, H, W); any for clients without one."""
        low, high = self._starts[start:stop], self._starts[start + 1 : stop + 1] - 1
        if not len(self.index):
            return np.empty((stop - start, 0), dtype=np.uint8)
        rows = np.stack([low, np.maximum(high, low)], axis=1).clip(0, len(self.index) - 1).reshape(-1)
        images: Tensor = self._share.whole.batch(torch.from_numpy(rows))[0].cpu()
        result: NDArray[np.uint8] = images.reshape(stop - start, 2, *images.shape[1:]).numpy()
        return result
