"""sgdp: SGD whose momentum does not lengthen the weights that a normalization follows.

Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha. AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights. ICLR 2021. https://arxiv.org/abs/2006.08217, algorithm 1. Official code: clovaai/AdamP, ``adamp/sgdp.py``.

    m <- momentum m + (1 - dampening) g,     u = g + momentum m  (Nesterov)  or  m
    u <- u without its component along w,    where g has almost none (``fednorm/optimizers/_radial.py``); r = wd_ratio
    w <- w (1 - lr weight_decay r / (1 - momentum)),     r = 1 where nothing was taken out
    w <- w - lr u

Without Nesterov u *is* the momentum, so what is taken out of u is taken out of m for good: as in the official code.

The test is strict: for a 3x3 convolution of 64 channels |cos| must be below 0.1 / sqrt(576) = 0.0042. A term that pulls
along the weight (FedProx's, SCAFFOLD's, EWC's, ``train.l2_init``) is part of the gradient that is tested, and can keep
the projection from ever acting; ``weight_decay`` is decoupled and is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.optimizers import OptimizerSpec
from fednorm.optimizers._radial import (
    Projected,
    below_one,
    laid_like,
    not_negative,
    remove_radial,
    require_projection,
)

CITATION = Citation(
    title="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    authors="Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha",
    year=2021,
    arxiv="2006.08217",
    where="ICLR 2021; official code clovaai/AdamP",
)


class SGDP(Projected):
    """SGD with projection.

    Args:
        params: The parameters, or groups of them.
        lr: The learning rate, greater than 0.
        momentum: In [0, 1).
        dampening: Of the momentum; it acts in the first step too.
        weight_decay: 0 or more; decoupled from the gradient, and divided by ``1 - momentum``.
        nesterov: Whether a step looks ahead along the momentum.
        eps: Least norm that is divided by.
        delta: How nearly orthogonal gradient and weight must be, 0 or more; 0 for never.
        wd_ratio: Share of the weight decay that a projected weight gets, in [0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
    ) -> None:
        require_projection("sgdp", lr=lr, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio)
        below_one("sgdp", "momentum", momentum)
        not_negative("sgdp", "dampening", dampening, at_most=1)
        options.number("sgdp", "eps", eps, above=0)
        options.flag("sgdp", "nesterov", nesterov)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
        }
        super().__init__(params, defaults)

    def step_of(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter."""
        momentum, rate = group["momentum"], group["lr"]
        update = gradient * (1 - group["dampening"])
        if momentum:
            state = self.state[parameter]
            buffer = state["momentum_buffer"] = laid_like(state.get("momentum_buffer"), parameter)
            buffer.mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
            update = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        elif group["nesterov"]:
            update = gradient.clone()
        projected = remove_radial(update, parameter, gradient, delta=group["delta"], eps=group["eps"])
        if group["weight_decay"]:
            share = group["wd_ratio"] if projected else 1.0
            parameter.mul_(1 - rate * group["weight_decay"] * share / (1 - momentum))
        parameter.add_(update, alpha=-rate)


def _make(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
) -> torch.optim.Optimizer:
    return SGDP(
        list(parameters),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        delta=delta,
        wd_ratio=wd_ratio,
    )


SPEC = OptimizerSpec(
    name="sgdp",
    summary="SGD whose momentum does not lengthen the weights that a normalization follows; decoupled weight decay.",
    citation=CITATION,
    make=_make,
    has_momentum=True,
    verified=("Golden trace sgdp: ten steps of clovaai/AdamP's SGDP, both views, float64.",),
)
