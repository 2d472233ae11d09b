"""The batches of a cohort: which rows each client draws in each step, and their images as one tensor.

Rows and augmentations are drawn from each client's own streams, as its turn alone draws them. Batches are padded to one
number of rows, which is the run's and not the cohort's, so that nothing depends on who else is there: a padded
row repeats the first image of its batch and is masked, a client that has no batch left repeats its first one and is
not updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fednorm.data.augment import Augmentation
from fednorm.data.domain import Split, taken


@dataclass(frozen=True)
class Plan:
    """The rows of a cohort's batches in one phase, on the CPU.

    Attributes:
        rows: Numbers of each client's training images, int64, shape (K, steps, B).
        counts: How many of them are images, 0 where a client has no batch left; int64, shape (K, steps).
    """

    rows: Tensor
    counts: Tensor

    @property
    def steps(self) -> int:
        """The steps of the client that has most."""
        return self.rows.shape[1]

    @classmethod
    def of(cls, batches: Sequence[Sequence[Tensor]], size: int) -> Plan:
        """Return the plan of each client's batches.

        Args:
            batches: For each client the rows of its batches.
            size: B, at least as many rows as any batch has.
        """
        steps = max((len(own) for own in batches), default=0)
        counts = torch.tensor([[len(rows) for rows in own] + [0] * (steps - len(own)) for own in batches])
        rows = torch.zeros(len(batches), steps, size, dtype=torch.int64)
        full = [k for k, own in enumerate(batches) if len(own) == steps and all(len(batch) == size for batch in own)]
        if full and steps:
            rows[full] = torch.stack([batch for k in full for batch in batches[k]]).view(len(full), steps, size)
        for k in sorted(set(range(len(batches))) - set(full)):
            for step, batch in enumerate(batches[k]):
                rows[k, step, : len(batch)] = batch
                rows[k, step, len(batch) :] = batch[0]
            if batches[k]:
                rows[k, len(batches[k]) :] = batches[k][0][0]
        return cls(rows, counts.view(len(batches), steps))

    @classmethod
    def drawn(cls, draws: Sequence[Draws], generators: Sequence[torch.Generator], size: int, padded: int) -> Plan:
        """Draw every client's batches, as :func:`~fednorm.federation.local.rows_of_phase` does for one of them.

        Args:
            draws: What each client draws; clients that draw alike are planned together.
            generators: Each client's.
            size: Images of a whole batch.
            padded: B, at least as many.
        """
        alike: dict[Draws, list[int]] = {}
        for place, own in enumerate(draws):
            alike.setdefault(own, []).append(place)
        forms = {own: own.batches(size, padded) for own in alike}
        steps = max((len(counts) for _, counts in forms.values()), default=0)
        rows = torch.zeros(len(draws), steps, padded, dtype=torch.int64)
        counts = torch.zeros(len(draws), steps, dtype=torch.int64)
        for own, places in alike.items():
            passes = -(-own.batches_wanted // max(1, -(-own.images // size)))
            orders = torch.stack(
                [torch.randperm(own.images, generator=generators[place]) for place in places for _ in range(passes)]
            )
            where, lengths = forms[own]
            drawn = orders.view(len(places), -1)[:, where]
            rows[places, : len(lengths)] = drawn
            counts[places, : len(lengths)] = lengths
            if 0 < len(lengths) < steps:
                rows[places, len(lengths) :] = drawn[:, :1, :1]
        return cls(rows, counts)


@dataclass(frozen=True)
class Draws:
    """What a client draws in a phase: so many batches of the passes over so many images.

    Attributes:
        images: How many it has.
        batches_wanted: How many batches, those counted that are left out.
        single: Whether a batch of one image is trained on.
    """

    images: int
    batches_wanted: int
    single: bool

    def batches(self, size: int, padded: int) -> tuple[Tensor, Tensor]:
        """Return where the rows of each batch stand in the orders of the passes, one after the other, and how many.

        Args:
            size: Images of a whole batch.
            padded: B.

        Returns:
            Places, a batch's first one in its padding, shape (steps, B), and the numbers of images, shape (steps,).
        """
        a_pass = -(-self.images // size)
        number = torch.arange(self.batches_wanted)
        begins = (number % a_pass) * size
        lengths = (self.images - begins).clamp(max=size)
        if not self.single:
            number, begins, lengths = (values[lengths > 1] for values in (number, begins, lengths))
        places = torch.arange(padded).expand(len(number), -1)
        places = torch.where(places < lengths[:, None], places, 0)
        return places + (begins + (number // a_pass) * self.images)[:, None], lengths


@dataclass(frozen=True)
class _Group:
    """Splits of one array: their places among all, their rows of it one after the other, and where each one's begin."""

    places: list[int]
    index: Tensor
    begins: Tensor


class Images:
    """The images of some clients' splits: rows of all of them are read by one look-up, where they share one array.

    Args:
        splits: One a client; none is empty.
        device: Where they are, and where batches are to be.

    Attributes:
        group_of: For each split the number of its group, of those that share one array and one scaling; shape (K,).
    """

    def __init__(self, splits: Sequence[Split], device: torch.device) -> None:
        self._splits, self._device = list(splits), device
        places: dict[object, list[int]] = {}
        for place, split in enumerate(self._splits):
            one = (id(split.images), id(split.labels), split.scaling) if type(split) is Split else place
            places.setdefault(one, []).append(place)
        self._groups = [self._grouped(own) for own in places.values()]
        order = torch.tensor([place for own in places.values() for place in own])
        self._order = order.argsort().to(device)
        numbers = torch.tensor([number for number, own in enumerate(places.values()) for _ in own])
        self.group_of = numbers[order.argsort()]

    def _grouped(self, places: list[int]) -> _Group:
        own = [self._splits[place].index for place in places]
        lengths = torch.tensor([index.shape[0] for index in own])
        return _Group(places, torch.cat(own), (lengths.cumsum(0) - lengths)[:, None])

    def read(
        self,
        rows: Tensor,
        counts: Tensor | None = None,
        augmentation: Augmentation | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> tuple[Tensor, Tensor]:
        """Return a batch of every client.

        Args:
            rows: Of each client's split, int64 on the CPU, shape (K, B).
            counts: How many of them are images, shape (K,); for augmenting, which draws for images alone.
            augmentation: What is done to the images; None for nothing.
            generators: Each client's, from which augmentations draw.

        Returns:
            Images as a network is given them, float32, shape (K, B, C, H, W), and labels, shape (K, B).
        """
        parts = []
        for group in self._groups:
            images, labels = self._pixels(group, rows)
            if augmentation and counts is not None:
                own = [(int(counts[place]), generators[place]) for place in group.places]
                images = _augmented(images.view(len(own), -1, *images.shape[1:]), own, augmentation).flatten(0, 1)
            images = self._splits[group.places[0]].scaling(images)
            count = len(group.places)
            parts.append((images.reshape(count, -1, *images.shape[1:]), labels.view(count, -1)))
        if len(parts) == 1:
            return parts[0]
        images, labels = (torch.cat([part[i] for part in parts])[self._order] for i in (0, 1))
        return images, labels

    def rows_of(self, owners: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return single images, each of a split of its own.

        Args:
            owners: The places of their splits, in ascending order of groups, int64 on the CPU, shape (n,).
            rows: Their rows of these, shape (n,).

        Returns:
            Images as a network is given them, shape (n, C, H, W), and labels, shape (n,).
        """
        if len(self._groups) == 1 and len(self._splits) > 1:  # as most federations are: one look-up, nothing sorted
            (group,) = self._groups
            return self._at(group, rows + group.begins[owners, 0])
        parts = []
        groups = self.group_of[owners]
        for number, group in enumerate(self._groups):
            of_group = groups == number
            if not of_group.any():
                continue
            first = self._splits[group.places[0]]
            if type(first) is not Split:
                parts.append(first.inputs(rows[of_group]))
                continue
            begins = torch.zeros(len(self._splits), dtype=torch.int64)
            begins[group.places] = group.begins[:, 0]
            parts.append(self._at(group, rows[of_group] + begins[owners[of_group]]))
        images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return images, labels

    def _at(self, group: _Group, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images at some places of a group's rows, as a network is given them, and their labels."""
        first, where = self._splits[group.places[0]], taken(group.index, places.to(self._device))
        return first.scaling(taken(first.images, where)), taken(first.labels, where)

    def _pixels(self, group: _Group, rows: Tensor) -> tuple[Tensor, Tensor]:
        first = self._splits[group.places[0]]
        if type(first) is not Split:
            return first.batch(rows[group.places[0]])
        of_group = rows if len(group.places) == len(rows) else rows[group.places]
        where = taken(group.index, (of_group + group.begins).flatten().to(self._device))
        return taken(first.images, where), taken(first.labels, where)


def _augmented(images: Tensor, own: Sequence[tuple[int, torch.Generator]], augmentation: Augmentation) -> Tensor:
    """Augment each client's images by its own draws, and repeat the first of them in the padding."""
    images = images.clone()
    for batch, (count, generator) in zip(images, own, strict=True):
        if count:
            batch[:count] = augmentation(batch[:count], generator)
            batch[count:] = batch[:1]
    return images
