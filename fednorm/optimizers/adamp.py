"""adamp: Adam whose moments do not lengthen the weights that a normalization follows.

Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha. AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
Weights. ICLR 2021. https://arxiv.org/abs/2006.08217, algorithm 2. Official code: clovaai/AdamP, ``adamp/adamp.py``.

    m <- b1 m + (1 - b1) g,     v <- b2 v + (1 - b2) g^2,     d = sqrt(v) / sqrt(1 - b2^t) + eps
    u = (b1 m + (1 - b1) g) / d  (Nesterov)  or  m / d
    u <- u without its component along w,    where g has almost none (``fednorm/optimizers/_radial.py``); r = wd_ratio
    w <- w (1 - lr weight_decay r),     r = 1 where nothing was taken out
    w <- w - lr / (1 - b1^t) u

The moments are never projected. What is said of the test in ``fednorm/optimizers/sgdp.py`` holds here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.optimizers import OptimizerSpec
from fednorm.optimizers._radial import Projected, below_one, laid_like, remove_radial, require_projection
from fednorm.optimizers.sgdp import CITATION


class AdamP(Projected):
    """Adam with projection.

    Args:
        params: The parameters, or groups of them.
        lr: The learning rate, greater than 0.
        betas: b1 and b2, both in [0, 1).
        eps: Added to the root of the second moment, and the least norm that is divided by.
        weight_decay: 0 or more; decoupled from the gradient.
        delta: How nearly orthogonal gradient and weight must be, 0 or more; 0 for never.
        wd_ratio: Share of the weight decay that a projected weight gets, in [0, 1].
        nesterov: Whether a step looks ahead along the first moment.

    Raises:
        ConfigError: An option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
    ) -> None:
        require_projection("adamp", lr=lr, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio)
        options.number("adamp", "eps", eps, above=0)
        for beta in betas:
            below_one("adamp", "betas", beta)
        options.flag("adamp", "nesterov", nesterov)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def step_of(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter."""
        first, second = group["betas"]
        state = self.state[parameter]
        # A tensor on the CPU, as PyTorch's Adam has it: what keeps optimizers' states keeps tensors.
        step = state["step"] = state.get("step", torch.tensor(0.0)) + 1
        mean = state["exp_avg"] = laid_like(state.get("exp_avg"), parameter)
        square = state["exp_avg_sq"] = laid_like(state.get("exp_avg_sq"), parameter)
        count = int(step)
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square.sqrt() / math.sqrt(1 - second**count)).add_(group["eps"])
        update = (first * mean + (1 - first) * gradient if group["nesterov"] else mean) / scale
        projected = remove_radial(update, parameter, gradient, delta=group["delta"], eps=group["eps"])
        if group["weight_decay"]:
            share = group["wd_ratio"] if projected else 1.0
            parameter.mul_(1 - group["lr"] * group["weight_decay"] * share)
        parameter.add_(update, alpha=-group["lr"] / (1 - first**count))


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
    del momentum
    return AdamP(list(parameters), lr=lr, weight_decay=weight_decay, nesterov=nesterov, delta=delta, wd_ratio=wd_ratio)


SPEC = OptimizerSpec(
    name="adamp",
    summary="Adam whose moments do not lengthen the weights that a normalization follows; decoupled weight decay.",
    citation=CITATION,
    make=_make,
    adaptive=True,
    verified=("Golden trace adamp: ten steps of clovaai/AdamP's AdamP, both views, float64.",),
)
