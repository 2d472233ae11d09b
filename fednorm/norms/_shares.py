"""A batch's tasks, and each sample's share in the moments of its task, as AdaB2N's layers need them.

Every layer of a network asks for the same: the tasks are counted once a batch, and the shares made once for each size
of maps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fednorm.errors import DataError


class Batch(NamedTuple):
    """A batch's tasks, as all layers need them whose maps have one size.

    Attributes:
        share: 1 / (n_t P) at (part, its task), 0 elsewhere, shape (N * fold, num_tasks), P being the positions of a
            sample; a part is a sample, or one of the ``fold`` that a layer makes of one.
        counts: n_t, shape (num_tasks,).
        seen: 1 for tasks that have been seen, 0 for others, shape (num_tasks,).
        present: 1 for tasks that are in the batch, 0 for others, shape (num_tasks,).
        complete: Whether all tasks that have been seen are in the batch, so that the weights sum to 1.
    """

    share: Tensor
    counts: Tensor
    seen: Tensor
    present: Tensor
    complete: bool


class Batches:
    """The latest batch's tasks, and what has been made of them."""

    MOST = 64
    """Sizes that are kept; without tasks, batches of all sizes are of the same ones."""

    def __init__(self) -> None:
        self._latest: tuple[Any, Tensor | None] = (), None
        self._counted: dict[Any, Batch] = {}
        self._made: dict[Any, Batch] = {}

    def of(self, tasks: Tensor | None, num_seen: int, num_tasks: int, x: Tensor, fold: int) -> Batch:
        """Return what the layers make of a batch's tasks, in the type of ``x``; one task where there are none.

        Args:
            tasks: The task of every sample, shape (N,).
            num_seen: How many tasks have been seen.
            num_tasks: How many there may be.
            x: Maps (N, C, ...).
            fold: Parts that a sample is made of.

        Raises:
            DataError: There is not one task for each sample of ``x``.
        """
        if tasks is not None:
            require_one_each(tasks, x)
        asked = id(tasks), None if tasks is None else tasks._version
        if asked != self._latest[0]:
            # The tasks are kept too, so that no other tensor gets their id.
            self._latest, self._counted, self._made = (asked, tasks), {}, {}
        counted = num_seen, num_tasks, len(x), x.dtype, x.device
        key = counted, x.shape, fold
        batch = self._made.get(key)
        if batch is None:
            if len(self._made) == self.MOST:
                self._counted.clear()
                self._made.clear()
            if counted not in self._counted:
                self._counted[counted] = _counted(tasks, num_seen, num_tasks, x)
            batch = self._made[key] = _shared(self._counted[counted], x, fold)
        return batch


def require_one_each(tasks: Tensor, x: Tensor) -> None:
    """Require one task for each sample.

    Raises:
        DataError: There are more, or fewer.
    """
    if len(tasks) != len(x):
        raise DataError(
            f"AdaB2N was given the tasks of {len(tasks)} samples and then a batch of {len(x)}. Call "
            "set_tasks before every training forward, with one task number per sample."
        )


def _counted(tasks: Tensor | None, num_seen: int, num_tasks: int, x: Tensor) -> Batch:
    """Return a batch's tasks with 1 at (sample, its task) for the shares, of which those of any size are made."""
    numbers = torch.arange(num_tasks, device=x.device)
    tasks = numbers.new_zeros(len(x)) if tasks is None else tasks
    member = (tasks[:, None] == numbers).to(x.dtype)
    counts = member.sum(0)
    seen, present = (numbers < num_seen).to(x.dtype), (counts > 0).to(x.dtype)
    return Batch(member, counts, seen, present, bool((seen == present).all()))


def _shared(counted: Batch, x: Tensor, fold: int) -> Batch:
    share = counted.share / (counted.counts.clamp_min(1.0) * (x.numel() // (len(x) * x.shape[1])))
    return counted._replace(share=share if fold == 1 else share.repeat_interleave(fold, 0))


BATCHES = Batches()
