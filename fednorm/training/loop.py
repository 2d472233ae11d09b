"""The loop that trains, of a client's round and a learner's experience alike: a pass in batches, and what was seen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fednorm.device import wide
from fednorm.scalar import scalar


def batches_of(order: Tensor, size: int, *, single: bool, begin: int = 0, whole: bool = False) -> Iterator[Tensor]:
    """Yield the rows of each batch of a pass; empty in place of a batch that is not trained on.

    A last batch of one image has no variance: where the layers estimate one, it is left out, and still counts as a
    batch, so that where a run is does not depend on its norm.

    Args:
        order: The rows of a pass, int64, shape (n,).
        size: Rows a batch; the last one may have fewer.
        single: Whether a batch of one row is trained on.
        begin: The first batch, from 0, of a pass that was begun before.
        whole: Whether a last batch of fewer rows is no batch.
    """
    batches = torch.split(order, size) if len(order) > size else (order,)  # several times as long as the one batch
    if whole and len(batches[-1]) < size:
        batches = batches[:-1]
    for rows in batches[begin:]:
        yield rows if single or len(rows) > 1 else rows[:0]


class Tally:
    """What was seen of the images that were trained on, each just before the update that it was part of.

    Attributes:
        seen: How many, counted each time.
    """

    def __init__(self, device: torch.device) -> None:
        self.seen = 0
        self._device = device
        self._hits: Tensor | None = None
        self._loss_sum: Tensor | None = None

    @property
    def hits(self) -> Tensor:
        """How many of them the model got right, int64; it may be written to."""
        if self._hits is None:
            self._hits = torch.zeros((), dtype=torch.int64, device=self._device)
        return self._hits

    @property
    def loss_sum(self) -> Tensor:
        """The sum of their losses, float64 where the device has it; it may be written to."""
        if self._loss_sum is None:
            self._loss_sum = torch.zeros((), dtype=wide(self._device), device=self._device)
        return self._loss_sum

    def add(self, loss: Tensor, right: Tensor, count: int) -> None:
        """Add a batch.

        Args:
            loss: The mean loss of its images, a scalar.
            right: How many of them were right, int64, a scalar; the tally's from now on.
            count: How many there are.
        """
        loss = loss.detach()
        losses = loss * scalar(float(count), loss)
        # A tiny client's one batch is its sum: to make zeros first and add to them takes several times as long.
        self._hits = right if self._hits is None else self._hits.add_(right)
        self._loss_sum = losses.to(wide(self._device)) if self._loss_sum is None else self._loss_sum.add_(losses)
        self.seen += count

    def clear(self) -> None:
        """Begin anew."""
        self.seen, self._hits, self._loss_sum = 0, None, None

    def means(self) -> dict[str, float]:
        """Return the mean ``loss`` and ``accuracy``; zeros where nothing was seen."""
        count = max(self.seen, 1)
        return {"loss": float(self.loss_sum) / count, "accuracy": int(self.hits) / count}
