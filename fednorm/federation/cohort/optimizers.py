"""Updates of a stack of clients: PyTorch's optimizers written out, with an axis of clients before each tensor.

SGD and the Adams act on every entry by itself, so that their formulas need no change. What an optimizer remembers
begins anew with every round, as it does for one client, and is a stack of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fednorm.config import TrainConfig
from fednorm.device import wide
from fednorm.federation.cohort.network import is_shared

Tensors = dict[str, Tensor]


class StackedOptimizer(Protocol):
    """Updates stacked parameters in place.

    Attributes:
        parts: Whether parameters that clients still share may be given to a step of all clients: it puts each
            client's own in their place.
    """

    parts: ClassVar[bool]

    def __call__(
        self, parameters: Tensors, gradients: Mapping[str, Tensor], rate: float, active: Tensor | None = None
    ) -> None:
        """Take one step with the gradients, which may be overwritten; parameters without one stay as they are.

        Args:
            parameters: By key, shape (K, ...).
            gradients: By key.
            rate: The learning rate.
            active: Of which clients this is a step, bool, shape (K,); None for all. What it remembers of the others
                stays; their parameters are the caller's to put back.
        """


class StackedSGD:
    """Stochastic gradient descent, as :mod:`fednorm.optimizers.sgd`.

        g <- gradient + weight_decay * w,   b <- momentum * b + g,   w <- w - lr * b  (nesterov: lr * (g + momentum b))

    Args:
        train: Momentum, weight decay and nesterov.
    """

    parts: ClassVar[bool] = True

    def __init__(self, train: TrainConfig) -> None:
        self.momentum, self.weight_decay, self.nesterov = train.momentum, train.weight_decay, train.nesterov
        self._velocity: Tensors = {}

    @torch.no_grad()
    def __call__(
        self, parameters: Tensors, gradients: Mapping[str, Tensor], rate: float, active: Tensor | None = None
    ) -> None:
        """Take one step."""
        keys = list(gradients)
        values, steps = [parameters[key] for key in keys], [gradients[key] for key in keys]
        if self.weight_decay:
            torch._foreach_add_(steps, values, alpha=self.weight_decay)
        if self.momentum:
            steps = self._with_momentum(keys, steps, active)
        if any(map(is_shared, values)):
            parameters |= zip(keys, torch._foreach_add(values, steps, alpha=-rate), strict=True)
        else:
            torch._foreach_add_(values, steps, alpha=-rate)

    def _with_momentum(self, keys: list[str], steps: list[Tensor], active: Tensor | None) -> list[Tensor]:
        # A velocity of zeros gives the first step what PyTorch gives it: the gradient itself.
        before = [self._velocity.get(key) for key in keys]
        old = [torch.zeros_like(step) if v is None else v for v, step in zip(before, steps, strict=True)]
        velocities = list(torch._foreach_add(torch._foreach_mul(old, self.momentum), steps))
        kept = velocities if active is None else [where(active, new, v) for new, v in zip(velocities, old, strict=True)]
        self._velocity |= dict(zip(keys, kept, strict=True))
        if self.nesterov:
            return list(torch._foreach_add(steps, velocities, alpha=self.momentum))
        return velocities


class StackedAdam:
    """Adam and AdamW with PyTorch's defaults, beta 0.9 and 0.999, eps 1e-8.

    Args:
        train: Weight decay.
        decoupled: Whether the weights decay by themselves (adamw) instead of through the gradient.
    """

    parts: ClassVar[bool] = False
    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, train: TrainConfig, *, decoupled: bool) -> None:
        self.weight_decay, self.decoupled = train.weight_decay, decoupled
        self._state: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self, parameters: Tensors, gradients: Mapping[str, Tensor], rate: float, active: Tensor | None = None
    ) -> None:
        """Take one step."""
        one, two = self.BETAS
        for key, gradient in gradients.items():
            value = parameters[key]
            if self.decoupled:
                value.mul_(1 - rate * self.weight_decay)
            elif self.weight_decay:
                gradient = gradient.add(value, alpha=self.weight_decay)
            old = self._state.get(key) or self._begun(value)
            steps = old[0] + 1
            mean, square = old[1].lerp(gradient, 1 - one), (old[2] * two).addcmul_(gradient, gradient, value=1 - two)
            new = (steps, mean, square)
            kept = new if active is None else tuple(where(active, a, b) for a, b in zip(new, old, strict=True))
            self._state[key] = (kept[0], kept[1], kept[2])
            first, second = (by_client((1 - beta**steps).to(value.dtype), value) for beta in (one, two))
            root = square.sqrt().div_(second.sqrt()).add_(self.EPS)
            value.sub_((mean / root).mul_(rate / first))

    @staticmethod
    def _begun(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = torch.zeros(len(value), dtype=wide(value.device), device=value.device)
        return steps, torch.zeros_like(value), torch.zeros_like(value)


def by_client(values: Tensor, like: Tensor) -> Tensor:
    """Return values of shape (K, ...) with axes of size 1 behind, to go with ``like``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the new values of the clients that are active, bool, shape (K,), and the old ones of the others."""
    return torch.where(by_client(active, new), new, old)


MAKERS: Mapping[str, Callable[[TrainConfig], StackedOptimizer]] = {
    "sgd": StackedSGD,
    "adam": lambda train: StackedAdam(train, decoupled=False),
    "adamw": lambda train: StackedAdam(train, decoupled=True),
}
"""How the optimizers that have a stacked form are made, by name."""
