"""A client's turn as a learner: some passes over the experience it is at, with all that it remembers.

What a learner remembers (its memory of samples, its teacher, its springs, how far it has come) is the client's: it
lives in ``Context.state`` as plain tensors under ``learner/``, is in every checkpoint, and is never sent. So are the
normalization tensors of the experiences that have ended, where they are kept (``grid.norms = "per_experience"``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fednorm.federation.local import Local, Turn, held
from fednorm.streams.learner import Learner, Progress

if TYPE_CHECKING:
    from fednorm.federated_continual.workbench import GridWorkbench

PLACE = "learner/"
"""What the keys of a learner's tensors begin with, among those that a client keeps."""

_OWN = f"{PLACE}own/"
_NORMS = f"{PLACE}norms/"
_COUNTS = ("step", "ended", "begun", "epoch", "batch", "seen", "met")


def remembered(learner: Learner) -> dict[str, Tensor]:
    """Return what a learner is to go on with, its network and its optimizer left out, as tensors."""
    progress = learner.progress
    counts = [*(int(getattr(progress, name)) for name in _COUNTS[:5]), learner.tally.seen, learner.met]
    plain = {
        "counts": torch.tensor(counts, dtype=torch.int64),
        "experience": torch.tensor(learner.experience_number if progress.begun else -1, dtype=torch.int64),
        "tasks": torch.tensor(learner.tasks_seen, dtype=torch.int64),
        "hits": learner.hits,
        "hits_of_all": learner.tally.hits,
        "loss_sum": learner.tally.loss_sum,
    }
    tensors = {PLACE + name: tensor for name, tensor in plain.items()}
    tensors |= {_OWN + key: tensor for key, tensor in learner.own_tensors().items()}
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


def recall(learner: Learner, kept: Mapping[str, Tensor]) -> None:
    """Give a learner that was just made what :func:`remembered` gave of the one before; nothing before its first."""
    if f"{PLACE}counts" not in kept:
        return
    *progress, seen, met = kept[f"{PLACE}counts"].tolist()
    learner.progress = Progress(**dict(zip(_COUNTS, progress, strict=False)))
    learner.progress.begun = bool(learner.progress.begun)
    learner.tally.seen, learner.met = seen, met
    learner.tasks_seen = kept[f"{PLACE}tasks"].tolist()
    learner.hits.copy_(kept[f"{PLACE}hits"])
    learner.tally.hits.copy_(kept[f"{PLACE}hits_of_all"])
    learner.tally.loss_sum.copy_(kept[f"{PLACE}loss_sum"])
    own = {k.removeprefix(_OWN): t.to(learner.device, copy=True) for k, t in kept.items() if k.startswith(_OWN)}
    learner.load_own_tensors(own)


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what a client keeps of its strategy's side, and of its learner's."""
    learners = {key: tensor for key, tensor in state.items() if key.startswith(PLACE)}
    return {key: tensor for key, tensor in state.items() if key not in learners}, learners


def begun(kept: Mapping[str, Tensor]) -> int | None:
    """Return the number of the experience that a client's learner has begun and not ended; None for none."""
    number = int(kept.get(f"{PLACE}experience", torch.tensor(-1)))
    return None if number < 0 else number


Norms = dict[int, dict[str, Tensor]]
"""By the number of an experience that has ended: its normalization tensors."""


def norms_of(kept: Mapping[str, Tensor]) -> Norms:
    """Return the normalization tensors that a client keeps of experiences."""
    norms: Norms = {}
    for path, tensor in kept.items():
        if path.startswith(_NORMS):
            number, key = path.removeprefix(_NORMS).split("/", 1)
            norms.setdefault(int(number), {})[key] = tensor
    return norms


def named_norms(norms: Norms) -> dict[str, Tensor]:
    """Return normalization tensors under the names that a client keeps them by."""
    return {f"{_NORMS}{number}/{key}": tensor for number, own in norms.items() for key, tensor in own.items()}


@dataclass
class GridTurn(Turn):
    """A client's turn in which its learner trains.

    Attributes:
        bench: The run's workbench.
    """

    bench: GridWorkbench = field(kw_only=True)
    _learner: Learner | None = field(default=None, init=False)

    def task_numbers(self) -> list[int]:
        """Return the numbers of the experiences that the client's learner has seen, in order."""
        return self._learner.tasks_seen if self._learner else []

    def fit(self, local: Local) -> dict[str, float]:
        """Train for a round's passes over the experience that the client is at.

        Returns:
            The mean ``loss`` and ``accuracy`` over the new samples as they were seen; at the end of an experience also
            ``own-accuracy-I`` of this network on each experience I that the client has met.
        """
        bench, trainee, client = self.bench, self.trainee, self.client.partition_id
        time = bench.time_of(self.server_round)
        cell = bench.grid.cells[client][time]
        assert cell is not None, "nobody is sampled at a time at which it holds nothing"
        trainee.set_rate(self.rate)
        self.state, kept = split_state(self.state)
        local.begin(self)
        criterion = local.criterion(self, cell.classes)
        learner = bench.learner(client, adjust=lambda: local.adjust(self), criterion=criterion)
        learner.epoch_watchers.append(lambda _: bench.norms.rest(time))
        self._learner = learner
        recall(learner, kept)
        norms = bench.end_late(learner, client, kept, cell)
        step, tally = learner.progress.step, learner.tally
        before = (tally.seen, int(tally.hits), float(tally.loss_sum)) if learner.progress.begun else (0, 0, 0.0)
        with bench.norms.frozen(time):
            learner.train_passes(cell, bench.passes)
            if learner.trains_at_end:
                learner.train_part(cell, *bench.part_of(self.server_round))
        self.steps = learner.progress.step - step
        trainee.optimizer.zero_grad(set_to_none=True)
        self.reply = held(local.end(self), "Local.end sends")
        self.state |= remembered(learner) | named_norms(norms)
        seen = max(tally.seen - before[0], 1)
        metrics = {
            "loss": (float(tally.loss_sum) - before[2]) / seen,
            "accuracy": (int(tally.hits) - before[1]) / seen,
        }
        if bench.ends_experience(self.server_round):
            metrics |= bench.scores(learner, client, time, "own-accuracy", norms)
        return metrics
