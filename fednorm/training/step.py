"""The training step: loss, gradients, clipping, update. Clients of a federation and learners of a stream share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.errors import DataError
from fednorm.spec import HookedLayer, NormSpec


def hooked_layers(model: nn.Module) -> tuple[HookedLayer, ...]:
    """Return a model's layers that take part in the step, in module order."""
    return tuple(module for module in model.modules() if isinstance(module, HookedLayer))


class TrainingStep:
    """One step of training on one batch.

    The order is: the layers' hooks are told the tasks, forward, cross-entropy plus the layers' penalties, backward,
    ``adjust`` (each may change the gradients in place: a proximal term, clipping), the optimizer's update, ``after``
    (each may change the parameters: a projection).

    Attributes:
        model: The model; it must be in training mode. Its layers are looked through once, here, unless it is given
            which of them take part.
        optimizer: Updates the parameters.
        adjust: Called between backward and update.
        after: Called after the update.
        loss: Of logits and labels, a scalar; the mean cross-entropy by default.
        hooked: The model's layers that take part in the step, in module order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        adjust: Sequence[Callable[[], None]] = (),
        after: Sequence[Callable[[], None]] = (),
        loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
        hooked: Sequence[HookedLayer] | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.adjust = tuple(adjust)
        self.after = tuple(after)
        self.hooked = hooked_layers(model) if hooked is None else tuple(hooked)
        self._penalties: list[Tensor] = []

    def __call__(
        self, images: Tensor, labels: Tensor, *, tasks: Tensor | None = None, num_tasks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Train on one batch with the loss.

        Args:
            images: Floats, shape (B, C, H, W).
            labels: Class numbers, shape (B,).
            tasks: The task number of every image, integers in [0, ``num_tasks``), shape (B,); None where unknown. Only
                layers with hooks see them.
            num_tasks: How many tasks have been seen, the present one included.

        Returns:
            The batch's loss before the update, penalties not included, and its logits, shape (B, K);
            both detached.

        Raises:
            DataError: A layer needs the tasks, and they do not fit the batch.
        """
        logits = self.forward(images, tasks=tasks, num_tasks=num_tasks)
        loss = self.loss(logits, labels)
        self.update(loss)
        return loss.detach(), logits.detach()

    def forward(
        self, images: Tensor, *, tasks: Tensor | None = None, num_tasks: int = 1, current: int | None = None
    ) -> Tensor:
        """Return the logits of a training forward pass, the layers told its tasks.

        For a loss of one's own: any number of forward passes, then one :meth:`update`. Arguments and errors are those
        of a call; ``current`` is the task that is being learned, ``num_tasks - 1`` if None.
        """
        self.announce(tasks, num_tasks, len(images), current)
        logits: Tensor = self.model(images)
        self._penalties += [penalty for layer in self.hooked if (penalty := layer.penalty()) is not None]
        return logits

    def update(self, loss: Tensor, *, fresh: bool = True) -> None:
        """Update the parameters by a loss, to which the penalties of the forward passes since the last update go.

        Args:
            loss: A scalar.
            fresh: Whether gradients are cleared before the backward pass; False where the caller has cleared them, and
                may have added some since.
        """
        penalties, self._penalties = self._penalties, []
        for penalty in penalties:
            loss = loss + penalty
        if fresh:
            self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for change in self.adjust:
            change()
        self.optimizer.step()
        for change in self.after:
            change()

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of a loss and of the penalties of the forward passes since the last update.

        For what is compared with the gradients of the coming update. Nothing is changed but that the penalties are
        taken.

        Args:
            loss: A scalar.

        Returns:
            Those of the model's parameters that are trained at the moment, in the model's order; zeros where there is
            none.
        """
        penalties, self._penalties = self._penalties, []
        for penalty in penalties:
            loss = loss + penalty
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(loss, trained, materialize_grads=True))

    def announce(self, tasks: Tensor | None, num_tasks: int, count: int, current: int | None = None) -> None:
        """Tell the layers with hooks the tasks of the coming batch of ``count`` images, and the one being learned.

        Raises:
            DataError: There is not one task in [0, ``num_tasks``) for each image.
        """
        if not self.hooked:
            return
        if tasks is not None:
            _require_tasks(tasks, num_tasks, count)
        announce(self.hooked, tasks, num_tasks, current)

    def end_experience(self) -> None:
        """Tell the layers with hooks that an experience has ended."""
        for layer in self.hooked:
            layer.end_experience()


def announce(layers: Iterable[HookedLayer], tasks: Tensor | None, num_tasks: int, current: int | None = None) -> None:
    """Tell layers with hooks the tasks of the coming batch, and which of them is being learned if not the newest."""
    for layer in layers:
        layer.set_tasks(tasks, num_tasks)
        if current is not None and tasks is not None:
            layer.set_current_task(current)


def _require_tasks(tasks: Tensor, num_tasks: int, count: int) -> None:
    if tuple(tasks.shape) != (count,):
        raise DataError(f"The step needs one task number per image: {count} images; got shape {tuple(tasks.shape)}.")
    low, high = (int(bound) for bound in tasks.aminmax())
    if low < 0 or high >= num_tasks:
        raise DataError(
            f"Task numbers lie in 0 to {num_tasks - 1}, for {num_tasks} tasks seen so far; got {low} to {high}. Pass "
            "num_tasks including the present task, and count tasks from 0."
        )


def batch_coupled(model: nn.Module, spec_of: Callable[[nn.Module], NormSpec | None]) -> bool:
    """Return whether one sample's output depends on its batch in training, so that a batch of one has no variance."""
    return any(
        (spec := spec_of(module)) is not None and getattr(module, "batch_coupled", spec.batch_coupled)
        for module in model.modules()
    )
