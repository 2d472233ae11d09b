"""The evaluation of many clients at once.

A network that is the same for all of them meets all their images one after the other, whoever's they are. Networks that
differ are stacked, a cohort at a time. Either way each image is scored by its client's tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fednorm.data.domain import Split
from fednorm.federation.cohort.batches import Images, Plan
from fednorm.federation.cohort.network import StackedNetwork, Tensors
from fednorm.federation.scores import Scores


def scored_alike(
    network: Callable[[Tensor], Tensor], splits: Sequence[Split], size: int, device: torch.device
) -> list[Scores]:
    """Return the scores of one network on each of several splits.

    Args:
        network: The network, in evaluation mode.
        splits: The images; some may be empty.
        size: Images of a pass.
        device: Where they are.
    """
    lengths = [len(split) for split in splits]
    counts = torch.tensor(lengths)
    owners = torch.repeat_interleave(torch.arange(len(splits)), counts)
    losses, hits = torch.zeros(len(owners), dtype=torch.float64), torch.zeros(len(owners), dtype=torch.float64)
    having = [split for split, length in zip(splits, lengths, strict=True) if length]
    if having:
        everything = _Union(having, [length for length in lengths if length], device)
        parts = [everything.scored(network, rows) for rows in torch.split(everything.order, size)]
        losses[everything.order] = torch.cat([loss for loss, _ in parts]).cpu().double()
        hits[everything.order] = torch.cat([hit for _, hit in parts]).cpu().double()
    # Summed on the CPU, in the order of the images: the same bits every time.
    sums = [torch.zeros(len(splits), dtype=torch.float64).index_add_(0, owners, values) for values in (losses, hits)]
    return _scores(lengths, *(total.tolist() for total in sums))


class _Union:
    """All rows of several splits, those of one array together.

    Attributes:
        order: The rows' numbers, counted over all splits, in the order in which they are read.
    """

    def __init__(self, splits: Sequence[Split], lengths: Sequence[int], device: torch.device) -> None:
        self._images = Images(splits, device)
        counts = torch.tensor(lengths)
        self._owner = torch.repeat_interleave(torch.arange(len(splits)), counts)
        begins = counts.cumsum(0) - counts
        self._row = torch.arange(len(self._owner)) - begins[self._owner]
        group = self._images.group_of[self._owner]
        self.order = torch.argsort(group, stable=True)

    def scored(self, network: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self._images.rows_of(self._owner[rows], self._row[rows])
        with torch.no_grad():
            logits = network(images)
            return functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels


def scored_apart(
    network: StackedNetwork,
    own: Tensors,
    shared: Mapping[str, Tensor],
    splits: Sequence[Split],
    size: int,
    device: torch.device,
) -> list[Scores]:
    """Return the scores of each client's own network on its own split.

    Args:
        network: The network.
        own: What each of K clients has of its own, by stacked key, shape (K, ...).
        shared: What they have alike, by stacked key.
        splits: K splits; some may be empty.
        size: Images of a client in a pass.
        device: Where they are.
    """
    empty = next((split for split in splits if len(split)), None)
    if empty is None:
        return _scores([0] * len(splits), [0.0] * len(splits), [0.0] * len(splits))
    images = Images([split if len(split) else empty for split in splits], device)
    plan = Plan.of([torch.split(torch.arange(len(split)), size) if len(split) else () for split in splits], size)
    loss = torch.zeros(len(splits), dtype=torch.float64)
    hits = torch.zeros(len(splits), dtype=torch.float64)
    for step in range(plan.steps):
        batch, labels = images.read(plan.rows[:, step])
        logits = network.evaluate(own, shared, batch)
        mask = torch.arange(size) < plan.counts[:, step, None]
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss += torch.where(mask, losses.view(labels.shape).cpu(), 0).sum(1)
        hits += ((logits.argmax(-1) == labels).cpu() & mask).sum(1)
    return _scores([len(split) for split in splits], loss.tolist(), hits.tolist())


def _scores(counts: Sequence[int], losses: Sequence[float], hits: Sequence[float]) -> list[Scores]:
    return [
        {"num-examples": count, "loss": loss / max(count, 1), "accuracy": hit / max(count, 1)}
        for count, loss, hit in zip(counts, losses, hits, strict=True)
    ]
