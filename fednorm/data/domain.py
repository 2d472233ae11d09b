"""The nouns of the data: a domain is a distribution, a client holds images of one domain.

Pixels are decoded once into one ``uint8`` array a domain. Clients hold *indices* into it, so that a thousand
clients of a process share one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fednorm.data.scaling import HALF, Scaling

if TYPE_CHECKING:
    from fednorm.data.clients import Counts


def taken(array: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of an array, a copy: ``array[rows]``.

    Of images in bytes on the CPU it takes a tenth of the time: rows are copied whole, and not value by value.
    """
    if not (array.is_contiguous() and array.is_cpu):
        return array[rows]
    try:
        return array.index_select(0, rows)
    except IndexError:  # rows counted from the end; and to say which is not there is indexing's business
        return array[rows]


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of a domain's array.

    Attributes:
        images: The whole array, uint8, shape (N, 3, H, W); shared, never copied or written.
        labels: The whole array's labels, int64, shape (N,).
        index: The rows that belong to this split, int64, shape (n,).
        content: What identifies the pixels of the whole array, where no file does: of data that somebody gave.
        scaling: From its pixels to what a network is given.
        labels_at_hand: Whether the labels can be had without reading the samples.
    """

    labels_at_hand: ClassVar[bool] = True

    images: Tensor
    labels: Tensor
    index: Tensor
    content: str = field(default="", kw_only=True)
    scaling: Scaling = field(default=HALF, kw_only=True)

    def __len__(self) -> int:
        """Return the number of images, n."""
        return self.index.shape[0]  # the length of a tensor takes three times as long

    @property
    def targets(self) -> Tensor:
        """Return the label of every row, int64, shape (n,)."""
        return self.labels[self.index]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8) and labels of some of this split's rows, numbered 0 to n - 1."""
        where = taken(self.index, rows.to(self.index.device))
        return taken(self.images, where), taken(self.labels, where)

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of this split's rows as a network is given them, float32, and their labels."""
        images, labels = self.batch(rows)
        return self.scaling(images), labels


@dataclass(frozen=True, eq=False)
class Domain:
    """A data distribution, e.g. ``mnist``: train and test images that share no source image.

    Attributes:
        name: The domain's name.
        train: Every training image.
        test: Every test image.
        note: What a reader of a table must know about it, e.g. that it is a stand-in.
    """

    name: str
    train: Split
    test: Split
    note: str = ""


@dataclass(frozen=True, eq=False)
class Client:
    """What one client holds.

    Attributes:
        partition_id: The client's number, 0 to K - 1.
        domain: The name of its domain.
        train: Its training images; no other client has any of them.
        validation: Images held back from its training images for choosing hyper-parameters; may be empty.
        test: Its share of the domain's test images.
        held_out: True for a client that only evaluates: its domain is unseen in training.
    """

    partition_id: int
    domain: str
    train: Split
    validation: Split
    test: Split
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class Federation:
    """Every client of a run, and what its tables must say about the data.

    Attributes:
        title: How a table names the data, e.g. ``digits (mnist, usps, mnistm)``; ``Digits-Five`` only where all five
            of the paper's domains are there.
        num_classes: K; labels are 0 to K - 1.
        image_size: Height and width of the images.
        clients: By partition id; held-out clients come last.
        notes: Sentences that belong under a table of results.
        class_names: The classes' names, where the data tells them.
    """

    title: str
    num_classes: int
    image_size: int
    clients: Sequence[Client]
    notes: tuple[str, ...] = field(default=())
    class_names: tuple[str, ...] = field(default=())

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the domains' names, in the order of their first client."""
        return self.counts.domains

    @cached_property
    def counts(self) -> Counts:
        """How many images each client has, in arrays: what is asked of all clients is asked of these."""
        from fednorm.data.clients import Counts

        return Counts.of(self.clients)

    @property
    def training_clients(self) -> tuple[Client, ...]:
        """Return the clients that train: those that are not held out and have training images."""
        return tuple(client for client in self.clients if not client.held_out and len(client.train))

    def digest(self) -> str:
        """Return what identifies the data: SHA-256 of rows, labels and some pixels of every client, 16 hex digits.

        Of each split, the pixels of its first and last image are read, and no others; data without files brings a
        digest of all of its pixels along (:attr:`Split.content`).
        """
        from fednorm.data.clients import digest_of_clients

        return digest_of_clients(self.clients)


@dataclass(frozen=True, eq=False)
class PooledSplit(Split):
    """The rows of several splits, one after the other; the arrays stay where they are.

    Attributes:
        parts: The splits; ``images``, which is the first one's array, is not read.
    """

    parts: tuple[Split, ...] = ()

    @classmethod
    def of(cls, parts: tuple[Split, ...]) -> PooledSplit:
        """Return the splits as one."""
        labels = torch.cat([part.targets for part in parts])
        return cls(parts[0].images, labels, torch.arange(len(labels)), parts, scaling=parts[0].scaling)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8) and labels of some of this split's rows."""
        rows = taken(self.index, rows)
        ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        owner = torch.bucketize(rows, ends, right=True)
        images = self.images.new_empty((len(rows), *self.images.shape[1:]))
        for number, part in enumerate(self.parts):
            mine = (owner == number).nonzero().flatten()
            if len(mine):
                images[mine] = part.batch(rows[mine] - (ends[number] - len(part)))[0]
        return images, taken(self.labels, rows)


def pooled(federation: Federation) -> Federation:
    """Return a federation whose first training client has the training images of all, and the others none.

    Test and validation images stay where they are, and so do clients and domains.
    """
    training = federation.training_clients
    if len(training) < 2:
        return federation
    union = PooledSplit.of(tuple(client.train for client in training))

    def share(client: Client) -> Split:
        if client is training[0]:
            return union
        return replace(client.train, index=client.train.index[:0])

    return replace(federation, clients=tuple(replace(client, train=share(client)) for client in federation.clients))


def pixels(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]: ``x / 127.5 - 1``, the mean 0.5, std 0.5 of FedBN's protocol.

    The result is laid out channels-last, in which convolutions on CPUs are faster.
    """
    return HALF(images)
