"""sgd: stochastic gradient descent with PyTorch's momentum; weight decay is added to the gradient.

g <- gradient + weight_decay * w,   b <- momentum * b + g,   w <- w - lr * b

With ``train.nesterov``, w <- w - lr * (g + momentum * b).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fednorm.optimizers import OptimizerSpec
from fednorm.optimizers._eager import SGD


def _make(
    parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, nesterov: bool = False
) -> torch.optim.Optimizer:
    return SGD(list(parameters), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=True)


SPEC = OptimizerSpec(
    name="sgd",
    summary="Stochastic gradient descent with momentum; weight decay is added to the gradient.",
    make=_make,
    has_momentum=True,
)
