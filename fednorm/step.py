"""The training step: loss, gradients, clipping, update. Clients of a federation and learners of a stream share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.spec import NormSpec


class TrainingStep:
    """One step of training on one batch.

    The order is: forward, cross-entropy, backward, ``adjust`` (each may change the gradients in place: a proximal
    term, clipping), the optimizer's update, ``after`` (each may change the parameters: a projection).

    Attributes:
        model: The model; it must be in training mode.
        optimizer: Updates the parameters.
        adjust: Called between backward and update.
        after: Called after the update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        adjust: Sequence[Callable[[], None]] = (),
        after: Sequence[Callable[[], None]] = (),
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.adjust = tuple(adjust)
        self.after = tuple(after)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one batch.

        Args:
            images: Floats, shape (B, C, H, W).
            labels: Class numbers, shape (B,).

        Returns:
            The batch's mean loss before the update, and its logits, shape (B, K); both detached.
        """
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        for change in self.adjust:
            change()
        self.optimizer.step()
        for change in self.after:
            change()
        return loss.detach(), logits.detach()


class ProximalTerm:
    """Adds the gradient of FedProx's term to the parameters' gradients.

        mu / 2 * sum ||w - w_t||^2,   gradient mu * (w - w_t)

    over the tensors given: the shared, learned ones. Li et al., Federated Optimization in Heterogeneous Networks,
    arXiv 1812.06127. The norm is squared, as in the paper's formula.
    """

    def __init__(self, parameters: Iterable[Tensor], mu: float) -> None:
        """Take the parameters' present values as w_t."""
        self.parameters = list(parameters)
        self.anchors = [parameter.detach().clone() for parameter in self.parameters]
        self.mu = mu

    @torch.no_grad()
    def __call__(self) -> None:
        """Add ``mu * (w - w_t)`` to every gradient."""
        trained = [(p, p.grad, a) for p, a in zip(self.parameters, self.anchors, strict=True) if p.grad is not None]
        if not trained:
            return
        values, grads, anchors = (list(column) for column in zip(*trained, strict=True))
        torch._foreach_add_(grads, torch._foreach_sub(values, anchors), alpha=self.mu)


def batch_coupled(model: nn.Module, spec_of: Callable[[nn.Module], NormSpec | None]) -> bool:
    """Return whether one sample's output depends on its batch in training, so that a batch of one has no variance."""
    return any((spec := spec_of(module)) is not None and spec.batch_coupled for module in model.modules())
