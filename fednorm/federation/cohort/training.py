"""A round's training of many clients at once, each as if it were alone.

What a turn does (:class:`~fednorm.federation.local.Turn`) is done to a stack: the same batches, the same loss, the same
effects in the same order, the same optimizer. A client that has no step left, or whose numbers are none any more,
changes nothing of the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fednorm.data.domain import Client
from fednorm.device import wide
from fednorm.federation.cohort.batches import Draws, Images, Plan
from fednorm.federation.cohort.effects import ADJUST, Adjust, After, StackedProjection, keys_by_identity
from fednorm.federation.cohort.network import StackedNetwork, Tensors, own
from fednorm.federation.cohort.optimizers import MAKERS, StackedOptimizer, where
from fednorm.federation.local import Phase
from fednorm.federation.workbench import Workbench
from fednorm.optim.projection import WeightProjection
from fednorm.rng import torch_streams
from fednorm.roles import Role


@dataclass(frozen=True)
class Trained:
    """What a cohort's training made of its clients.

    Attributes:
        tensors: By stacked key, shape (K, ...).
        loss: The mean loss over the images as they were seen, shape (K,).
        accuracy: Likewise, shape (K,).
    """

    tensors: Tensors
    loss: Tensor
    accuracy: Tensor


@dataclass
class _Seen:
    """Sums over the images that each client has seen, shape (K,)."""

    loss: Tensor
    hits: Tensor
    images: Tensor


def rows_of(bench: Workbench) -> int:
    """Return the images of the largest batch of a run."""
    counts = bench.federation.counts
    return min(bench.config.train.batch_size, int(counts.train[counts.trains].max(initial=1)))


def is_whole(bench: Workbench) -> bool:
    """Return whether every batch that a run trains on has as many images as the largest, so that none is padded."""
    counts, rows = bench.federation.counts, rows_of(bench)
    last = counts.train[counts.trains] % min(bench.config.train.batch_size, rows)
    none = (last == 0) | ((last == 1) if bench.trainee.batch_coupled else False)
    return rows > 1 and bool(none.all()) and bool((counts.train[counts.trains] >= rows).all())


class CohortTraining:
    """Trains cohorts of a run's clients.

    Args:
        bench: The run's workbench; its model holds the run's initial tensors when this is made.

    Attributes:
        network: The run's network for stacks of tensors.
        rows: B, the images of every padded batch: those of the largest batch of the run.
    """

    def __init__(self, bench: Workbench) -> None:
        trainee = bench.trainee
        self._bench, self._trainee = bench, trainee
        self.network = StackedNetwork(bench.model, bench.plan.keys(Role.CONSTANT))
        self.rows = rows_of(bench)
        self._whole = is_whole(bench)
        keys = keys_by_identity(bench.model, self.network.parameters)
        self._adjust: list[Adjust] = [ADJUST[type(effect)](effect, keys) for effect in trainee.adjust]
        self._after: list[After] = [
            StackedProjection(effect, keys) for effect in trainee.after if isinstance(effect, WeightProjection)
        ]

    def train(
        self,
        clients: Sequence[Client],
        tensors: Tensors,
        *,
        server_round: int,
        phases: Sequence[Sequence[Phase]],
        adjust: Adjust | None = None,
    ) -> Trained:
        """Train a cohort for a round.

        Args:
            clients: K clients; one may be there more than once, as padding.
            tensors: What each has before, by stacked key, shape (K, ...); they are changed, and replaced where clients
                share one (:func:`~fednorm.federation.cohort.network.alike`).
            server_round: The round.
            phases: Each client's, alike but for how long they are.
            adjust: What the strategy's clients do to the gradients, before all else.
        """
        trainee, device = self._trainee, self._trainee.device
        numbers = [client.partition_id for client in clients]

        def streams(of: str) -> list[torch.Generator]:
            return torch_streams(trainee.config.seed, ("client",), numbers, ("round", server_round, of))

        rows, draws = streams("batches"), streams("augment") if trainee.augmentation else []
        images = Images([client.train for client in clients], device)
        optimizer = MAKERS[trainee.config.train.optimizer](trainee.config.train)
        rate = self._bench.schedule.at(max(server_round, 1) - 1, 0, 1)
        zeros = torch.zeros(len(clients), dtype=wide(device), device=device)
        seen = _Seen(zeros, zeros, zeros)
        probing = server_round <= trainee.config.train.linear_probe_rounds
        with trainee.trainable.stage(probing):
            self.network.modes_of(trainee.model)
            active = trainee.trainable.active
        every = [*([adjust] if adjust else []), *self._adjust]
        for phase, each in _phase_by_phase(phases):
            keys = phase.parameters
            if keys is not None and not keys & active:
                continue
            trained = [key for key in self.network.parameters if key in active and (keys is None or key in keys)]
            step = _Step(self.network, trained, every, self._after, optimizer, rate, self._smoothing, self._whole)
            plan = self._planned(clients, rows, each)
            for number in range(plan.steps):
                counts = plan.counts[:, number]
                batch = images.read(plan.rows[:, number], counts, trainee.augmentation, draws)
                step(tensors, *batch, counts, seen)
        own(tensors, tensors)
        return Trained(tensors, seen.loss / seen.images, seen.hits / seen.images)

    @property
    def _smoothing(self) -> float:
        return self._trainee.config.train.label_smoothing

    def _planned(
        self, clients: Sequence[Client], generators: Sequence[torch.Generator], phases: Sequence[Phase]
    ) -> Plan:
        train, single = self._trainee.config.train, not self._trainee.batch_coupled
        draws = [
            Draws(count := len(client.train), phase.batches(train, -(-count // train.batch_size)), single)
            for client, phase in zip(clients, phases, strict=True)
        ]
        return Plan.drawn(draws, generators, train.batch_size, self.rows)


def _phase_by_phase(phases: Sequence[Sequence[Phase]]) -> list[tuple[Phase, tuple[Phase, ...]]]:
    return [(own[0], own) for own in zip(*phases, strict=True)]


@dataclass(frozen=True)
class _Step:
    """One step of every client of a cohort, in one phase."""

    network: StackedNetwork
    trained: Sequence[str]
    adjust: Sequence[Adjust]
    after: Sequence[After]
    optimizer: StackedOptimizer
    rate: float
    smoothing: float
    whole: bool

    def __call__(self, tensors: Tensors, images: Tensor, labels: Tensor, counts: Tensor, seen: _Seen) -> None:
        """Take it: change the tensors, and add what was seen.

        Args:
            tensors: By stacked key.
            images: Shape (K, B, C, H, W).
            labels: Shape (K, B).
            counts: Each client's images of the batch, on the CPU, shape (K,); 0 where it has none left.
            seen: Is added to.
        """
        device = images.device
        everyone = bool(counts.all())
        active = None if everyone else (counts > 0).to(device)
        size = images.shape[1]
        count = torch.where(counts > 0, counts, size).to(device)
        mask = torch.arange(size, device=device) < count[:, None]
        values = {key: tensors[key].detach() for key in self.network.parameters}
        for key in self.trained:
            values[key].requires_grad_()
        buffers = {key: tensors[key].clone() for key in self.network.buffers}
        logits, made = self.network.train(
            {**values, **buffers}, images, mask.to(images.dtype), count.to(images.dtype), whole=self.whole
        )
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=self.smoothing
        ).view(labels.shape)
        loss = torch.where(mask, losses, 0).sum(1) / count
        grads = torch.autograd.grad(loss.sum(), [values[key] for key in self.trained], allow_unused=True)
        with torch.no_grad():
            gradients = {k: grad for k, grad in zip(self.trained, grads, strict=True) if grad is not None}
            for key in self.trained:
                values[key].requires_grad_(False)
            for change in self.adjust:
                change(values, gradients)
            self._update(tensors, gradients, active)
            for key, value in {**buffers, **made}.items():
                tensors[key] = value if active is None else where(active, value, tensors[key])
            weight = count if active is None else torch.where(active, count, 0)
            hits = ((logits.argmax(-1) == labels) & mask).sum(1)
            # Sums of products with 0 would carry a finished client's NaN on.
            add = weight > 0
            seen.loss = torch.where(add, seen.loss + loss * count, seen.loss)
            seen.hits = torch.where(add, seen.hits + hits, seen.hits)
            seen.images = seen.images + weight

    def _update(self, tensors: Tensors, gradients: Mapping[str, Tensor], active: Tensor | None) -> None:
        if active is not None or not self.optimizer.parts:
            own(tensors, gradients)
        if self.after:
            own(tensors, [key for key in self.network.parameters if key not in gradients])
        if active is None:
            self.optimizer(tensors, gradients, self.rate)
            for change in self.after:
                change(tensors)
            return
        before = {key: tensors[key].clone() for key in (self.network.parameters if self.after else gradients)}
        self.optimizer(tensors, gradients, self.rate, active)
        for change in self.after:
            change(tensors)
        for key, old in before.items():
            tensors[key].copy_(where(active, tensors[key], old))
