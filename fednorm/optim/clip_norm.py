"""clip_norm: the gradient of all parameters together is shortened to a length.

    g <- g * min(1, c / ||g||_2)

Pascanu, Mikolov, Bengio. On the difficulty of training recurrent neural networks. ICML 2013.
https://arxiv.org/abs/1211.5063, algorithm 1. FLGo-Bench clips every client's gradient to 10.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class ClipNorm:
    """Shortens the gradient of all parameters together to at most ``largest``.

    Args:
        parameters: The parameters.
        largest: c, greater than 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], largest: float) -> None:
        self.parameters = list(parameters)
        self.largest = largest

    @torch.no_grad()
    def __call__(self) -> None:
        """Shorten the gradients in place; a gradient that is short enough stays as it is, bit for bit."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not grads:
            return
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if norm > self.largest:
            torch._foreach_mul_(grads, self.largest / norm)
