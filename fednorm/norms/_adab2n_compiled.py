"""AdaB2N's training pass by plain operations, of which a compiler makes a few passes over memory.

One by one they take several times as long as :mod:`fednorm.norms.adab2n`'s own function; compiled they cost what
PyTorch's batch normalization does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fednorm.norms._batch import per_channel
from fednorm.norms._precision import widened

if TYPE_CHECKING:
    from fednorm.norms.adab2n import AdaB2NLayer


def composed(
    layer: AdaB2NLayer, x: Tensor, tasks: Tensor | None, seen: Tensor | float, eta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the normalized batch and its penalty, lambd included; moves the running moments.

    Args:
        layer: Whose parameters and options these are.
        x: The batch, (N, C) or (N, C, ...), float32 or float64.
        tasks: The task of every sample, shape (N,); None where all are of one.
        seen: How many tasks have been seen, as a tensor: for every number code would be compiled anew.
        eta: The batch's weight in the running moments, a scalar of the type of ``x``.
    """
    weight, bias, psi = (widened(each) for each in (layer.weight, layer.bias, layer.task_weight))
    if tasks is None:
        shares = x.new_full((len(x), 1), 1.0 / len(x)) + 0.0 * psi[0]  # psi has the gradient 0
    else:
        shares = _shares(x, psi, tasks, seen, corrected=layer.config.corrected).unsqueeze(1)
    over = tuple(range(2, x.ndim))
    mean = (shares * (x.mean(over) if over else x)).sum(0)  # as a matrix product it would be no part of a pass
    centred = x - per_channel(mean, x)
    squares = centred.square()
    var = (shares * (squares.mean(over) if over else squares)).sum(0)
    y = centred * per_channel(weight * (var + layer.eps).rsqrt(), x) + per_channel(bias, x)
    moments = torch.cat([mean, var])
    gaps = moments - _moved(layer, moments.detach(), eta)
    return y, gaps.square().sum() * (layer.config.lambd / layer.num_features)


def _shares(x: Tensor, psi: Tensor, tasks: Tensor, seen: Tensor | float, *, corrected: bool) -> Tensor:
    """Return w, the share of every sample, shape (N,)."""
    numbers = torch.arange(len(psi), device=x.device)
    member = (tasks[:, None] == numbers).to(x.dtype)
    counts = member.sum(0)
    chosen = counts > 0 if corrected else numbers < seen
    mass = psi.exp() * chosen.to(x.dtype) + counts
    return (member / counts.clamp_min(1.0)) @ (mass / mass.sum())


@torch.no_grad()
def _moved(layer: AdaB2NLayer, moments: Tensor, eta: Tensor) -> Tensor:
    """Move the running moments; return mean and variance as they are now, shape (2 C,).

    By a matrix product: a compiled backward pass keeps what such a product gives, while it computes again what an
    interpolation gave, from buffers that have changed meanwhile, and is silently wrong.
    """
    running = torch.cat([widened(layer.running_mean), widened(layer.running_var)])
    moved: Tensor = (torch.stack([1.0 - eta, eta]).unsqueeze(0) @ torch.stack([running, moments])).squeeze(0)
    layer.running_mean.copy_(moved[: layer.num_features])
    layer.running_var.copy_(moved[layer.num_features :])
    return moved
