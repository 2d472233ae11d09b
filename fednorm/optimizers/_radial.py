"""What SGDP and AdamP share: an update without the part that only lengthens the weight.

Before a normalization a weight's length does not matter, but momentum adds to it all the same, and the longer the
weight, the less its direction moves. Heo et al. (arXiv 2006.08217, section 3) remove the update's component along the
weight wherever the gradient itself has (almost) none, which is how a scale-invariant weight is recognised:

    max over rows |cos(g, w)| < delta / sqrt(row length)
    u <- u - w_hat <w_hat, u> of each row,     w_hat = w / (||w|| + eps)

Rows are first the output channels (each row of a linear layer, each kernel of a convolution) and, where these do not
pass, the whole tensor. Tensors of fewer than two axes are never projected. As in clovaai/AdamP (adamp 0.3.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.optimizers._eager import Eager


def require_projection(method: str, *, lr: float, weight_decay: float, delta: float, wd_ratio: float) -> None:
    """Require a rate above 0, a weight decay and delta of 0 or more, and a ratio in [0, 1].

    Raises:
        ConfigError: One is something else.
    """
    options.number(method, "lr", lr, above=0)
    not_negative(method, "weight_decay", weight_decay)
    not_negative(method, "delta", delta)
    not_negative(method, "wd_ratio", wd_ratio, at_most=1)


def not_negative(method: str, option: str, value: Any, *, at_most: float = math.inf) -> None:
    """Require a number of 0 or more.

    Raises:
        ConfigError: It is something else.
    """
    options.number(method, option, value, at_most=at_most)
    if value < 0:
        raise ConfigError(f"{method}.{option} must be 0 or more; got {value!r}.")


def below_one(method: str, option: str, value: Any) -> None:
    """Require the share that a running mean keeps: a number in [0, 1).

    Raises:
        ConfigError: It is something else.
    """
    not_negative(method, option, value, at_most=1)
    if value == 1:
        raise ConfigError(f"{method}.{option} must be less than 1, or nothing new would count; got {value!r}.")


def remove_radial(update: Tensor, weight: Tensor, gradient: Tensor, *, delta: float, eps: float) -> int:
    """Take the component along the weight out of an update, in place, where the gradient has almost none.

    Args:
        update: What the weight is about to be moved along; of its shape.
        weight: The weight before the update.
        gradient: Its gradient, as the loss gave it.
        delta: How nearly orthogonal gradient and weight must be; 0 for never.
        eps: Least norm that is divided by.

    Returns:
        The view in which it was taken out: 1 for channels, 2 for the whole tensor; 0 where it was not.
    """
    if weight.ndim < 2 or not weight.numel():
        return 0
    every = tuple(range(weight.ndim))
    for view, axes in enumerate((every[1:], every), start=1):
        norm = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
        size = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True)
        cosine = (gradient * weight).sum(axes, keepdim=True).abs() / (norm.clamp_min(eps) * size.clamp_min(eps))
        if cosine.max() < delta / math.sqrt(math.prod(weight.shape[axis] for axis in axes)):
            direction = weight / (norm + eps)
            update.sub_(direction * (direction * update).sum(axes, keepdim=True))
            return view
    return 0


def laid_like(kept: Tensor | None, weight: Tensor) -> Tensor:
    """Return a state tensor in its weight's memory layout: a checkpoint does not keep that, and sums depend on it.

    Args:
        kept: The tensor; None for zeros.
        weight: The weight.
    """
    if kept is None:
        return torch.zeros_like(weight, memory_format=torch.preserve_format)
    if kept.stride() == weight.stride():
        return kept
    return torch.empty_like(weight, memory_format=torch.preserve_format).copy_(kept)


class Projected(Eager):
    """An optimizer of which one parameter after the other takes its step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss and the gradients anew, as PyTorch's optimizers take it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_of(parameter, parameter.grad, group)
        return loss

    def step_of(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update one parameter.

        Args:
            parameter: The parameter; changed in place.
            gradient: Its gradient.
            group: The options of its group.
        """
        raise NotImplementedError
