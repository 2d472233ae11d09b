"""Regenerative regularization: weights are pulled to their initial values instead of to zero.

Kumar, Marklund, Van Roy. Maintaining Plasticity in Continual Learning via Regenerative Regularization. 2023.
https://arxiv.org/abs/2308.11958. Called L2 Init there.

    loss + strength * sum ||w - w_0||²,     gradient + 2 * strength * (w - w_0)

with w_0 the values at initialisation, the sum over all parameters, and the factor 2 that follows from the formula. (A
``weight_decay`` of PyTorch's SGD has no such factor: it pulls to zero as much as ``strength = weight_decay / 2``.)

An effect on the gradients, between backward and update. It is a term of the loss, so it precedes gradient clipping,
and Adam's moments include it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fednorm import options


class L2Init:
    """Adds the gradient of ``strength * sum ||w - w_0||²`` to the parameters' gradients.

    It keeps no state that a checkpoint would need: built on the freshly initialised model, which a resumed run makes
    again from its seed before it loads its checkpoint, it has the same w_0.

    Args:
        parameters: The parameters w, with their initial values, which are kept as w_0. Those that are not trained
            (``requires_grad`` False at the time of a step) are left alone. All must be on one device.
        strength: lambda, greater than 0.

    Raises:
        ConfigError: ``strength`` is not greater than 0.
    """

    def __init__(self, parameters: Iterable[Tensor], strength: float) -> None:
        options.number("l2_init", "strength", strength, above=0)
        self.parameters = list(parameters)
        self.anchors = [parameter.detach().clone() for parameter in self.parameters]
        self.strength = strength

    @torch.no_grad()
    def __call__(self) -> None:
        """Add ``2 * strength * (w - w_0)`` to every gradient; where the loss gave none, this is the gradient."""
        trained = [(p, a) for p, a in zip(self.parameters, self.anchors, strict=True) if p.requires_grad]
        if not trained:
            return
        pulls = torch._foreach_sub([p for p, _ in trained], [a for _, a in trained])
        torch._foreach_mul_(pulls, 2 * self.strength)
        gradients: list[Tensor] = []
        added: list[Tensor] = []
        for (parameter, _), pull in zip(trained, pulls, strict=True):
            if parameter.grad is None:
                parameter.grad = pull
            else:
                gradients.append(parameter.grad)
                added.append(pull)
        if gradients:
            torch._foreach_add_(gradients, added)
