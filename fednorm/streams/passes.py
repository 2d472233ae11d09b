"""One batch through a network and its update, with places where others may look on or change something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.data.augment import Augmentation
from fednorm.data.scaling import Scaling
from fednorm.errors import DataError
from fednorm.streams.buffer import Buffer, Samples
from fednorm.training.step import TrainingStep


@dataclass
class BatchChanges:
    """What others, such as Avalanche's plugins, may do to a batch, and what they have done.

    Attributes:
        at_iteration: Whether someone is called before every step.
        at_batch: Whether someone is called around the forward and backward pass.
        images: What was put in the place of a group's images in this step, by the group's id.
        labels: The same for labels. A memory keeps the samples themselves.
    """

    at_iteration: bool = False
    at_batch: bool = False
    images: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget what was made of the last step's samples."""
        self.images.clear()
        self.labels.clear()


class Passes:
    """Passes through fednorm's training step.

    The methods ``_before_…`` and ``_after_…`` do nothing here; they are called at the places where Avalanche's
    templates call their plugins, and :mod:`fednorm.avalanche.strategy` puts those there. What is made of the batch, the
    labels, the output, the loss and the gradients counts.

    Attributes:
        model: The network.
        optimizer: Of its parameters.
        step: The training step.
        num_classes: K, the number of the network's outputs.
        augment: What is done to the images of every training batch.
        scaling: From pixels to what the network is given; its groups, if several, are the tasks.
        tasks_seen: The numbers of all experiences so far, each once.
        mbatch: The samples, as the network is given them, and the labels of the last pass; Avalanche's name.
        mb_output: Its logits.
        loss: The last loss.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: TrainingStep
    num_classes: int
    augment: Augmentation
    scaling: Scaling
    tasks_seen: list[int]
    mbatch: Any
    mb_output: Tensor
    loss: Tensor
    _criterion: Callable[[Tensor, Tensor], Tensor]
    _changes: BatchChanges
    _augmenting: torch.Generator
    _current_task: int

    def as_input(self, images: Tensor, tasks: Tensor | None) -> Tensor:
        """Return what the network is given of images: of pixels (uint8) floats, of anything else itself.

        Args:
            images: Shape (n, ...).
            tasks: The task of each, int64, shape (n,); None where all are scaled alike.
        """
        several = images.dtype == torch.uint8 and len(self.scaling.mean) > 1
        # A task's place is when it was first seen; the scaling knows tasks by their numbers.
        groups = torch.tensor(self.tasks_seen, device=tasks.device)[tasks] if several and tasks is not None else None
        return self.scaling(images, groups)

    def prepared(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Return pixels augmented, as floats; what came ready for the network as it came."""
        pixels = images.dtype == torch.uint8
        return self.as_input(self.augment(images, self._augmenting) if pixels else images, tasks)

    def pass_forward(self, *groups: Samples) -> tuple[Tensor, ...]:
        """Return the logits of each group of samples, from one training forward pass over all of them.

        Raises:
            DataError: The network does not have K outputs, or a plugin changed the number of samples.
        """
        parts = [(self._changes.images.get(id(group), group.images), group.tasks) for group in groups]
        images, one = self._joined(parts), groups[0]
        labels = one.labels if len(groups) == 1 else torch.cat([group.labels for group in groups])
        tasks = one.tasks if len(groups) == 1 else torch.cat([group.tasks for group in groups])
        if self._changes.at_batch:
            labels = torch.cat([self.labels_of(group) for group in groups]).clone()
        self.mbatch = [images, labels, torch.zeros_like(labels)]
        before = labels, labels._version
        self._before_forward()
        self._require_count(len(images))
        self.mb_output = self.step.forward(
            self.mbatch[0], tasks=tasks, num_tasks=len(self.tasks_seen), current=self._current
        )
        self._after_forward()
        self._require_outputs(len(images))
        after: Tensor = self.mbatch[1]
        if after is not before[0] or after._version != before[1]:
            changed = torch.split(after, [len(group) for group in groups])
            self._changes.labels |= {id(group): part for group, part in zip(groups, changed, strict=True)}
        if self._changes.at_batch:
            self.step.announce(None, 1, 0)  # a plugin's own passes are not over this batch
        if len(groups) == 1:
            return (self.mb_output,)
        return torch.split(self.mb_output, [len(group) for group in groups])

    def labels_of(self, group: Samples) -> Tensor:
        """Return the labels that a group's loss is taken with: its own, or what a plugin made of them."""
        return self._changes.labels.get(id(group), group.labels)

    def loss_of(self, logits: Tensor, *groups: Samples) -> Tensor:
        """Return the criterion of logits, shape (n, K), and the labels of one or more groups."""
        labels = [self.labels_of(group) for group in groups]
        loss: Tensor = self._criterion(logits, labels[0] if len(labels) == 1 else torch.cat(labels))
        return loss

    def offer(self, buffer: Buffer, new: Samples, logits: Tensor | None = None) -> None:
        """Offer new samples to a memory, as the data set gave them."""
        buffer.pixels = new.images.dtype == torch.uint8
        buffer.add(new.images, new.labels, new.tasks, logits)

    def descend(self, loss: Tensor) -> None:
        """Update the parameters by a loss."""
        self.loss = loss
        if self._changes.at_batch:
            self.optimizer.zero_grad(set_to_none=True)  # as in Avalanche, before a plugin may add gradients
        self._before_backward()
        self.step.update(self.loss, fresh=not self._changes.at_batch)

    def _joined(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(parts) == 1:
            return self.prepared(*parts[0])
        images, tasks = zip(*parts, strict=True)
        if len({part.dtype for part in images}) == 1:
            return self.prepared(torch.cat(images), torch.cat(tasks))
        return torch.cat([self.prepared(*part) for part in parts])

    def _require_outputs(self, count: int) -> None:
        if self.mb_output.ndim != 2 or self.mb_output.shape[1] != self.num_classes or len(self.mb_output) != count:
            raise DataError(
                f"The network's output for {count} samples has shape {tuple(self.mb_output.shape)}; the learner has "
                f"num_classes = {self.num_classes} and needs ({count}, {self.num_classes}), all outputs from the "
                "start. Give the network a last layer of that width instead of one that grows."
            )

    @property
    def _current(self) -> int | None:
        """The task that is being learned, None for the newest."""
        return None if self._current_task == len(self.tasks_seen) - 1 else self._current_task

    def _backward_done(self) -> None:
        self._after_backward()
        self.before_update()
        self._before_update()

    def before_update(self) -> None:
        """Do what a method does to the gradients just before an update."""

    # Where others look on ---------------------------------------------------------------------------------------------

    def _require_count(self, count: int) -> None:
        """Called with the number of samples, just before they go through the network."""

    def _before_forward(self) -> None: ...

    def _after_forward(self) -> None: ...

    def _before_backward(self) -> None: ...

    def _after_backward(self) -> None: ...

    def _before_update(self) -> None: ...

    def _after_update(self) -> None: ...
