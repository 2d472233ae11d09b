"""Shrink and perturb: weights are shrunk, and a fresh initialisation is added, before each new round of training.

Ash, Adams. On Warm-Starting Neural Network Training. NeurIPS 2020. https://arxiv.org/abs/1910.08475.
Official code: JordanAsh/warm_start.

    w <- shrink * w + perturb * w'

with w' a freshly initialised network of the same architecture, as in the official code, so that each kind of tensor
gets noise of its own initial distribution (the paper's text writes Gaussian noise). It is done once at the start of
every experience but the first; the official code does it whenever data arrives, with shrink 0.4 and perturb 0.1, and
takes a new optimizer each time, which is the caller's to do.

All parameters take part, scales and shifts of normalization layers included, as in the official code.
Differs: statistics are kept. The official code goes on in the fresh network, whose running moments are 0 and 1.

What Dohare et al. (Nature 2024) call by this name is another method: weight decay and a tiny Gaussian noise (variance
1e-5 or so) in *every step*. It is not this one.
"""

from __future__ import annotations

import torch
from torch import nn

from fednorm import options
from fednorm.errors import ConfigError


@torch.no_grad()
def shrink_and_perturb(model: nn.Module, fresh: nn.Module, *, shrink: float, perturb: float) -> None:
    """Set every trained parameter w of ``model`` to ``shrink * w + perturb * w'``, in place.

    Buffers, and parameters that are not trained (``requires_grad`` False), stay as they are.

    Args:
        model: The network; changed in place, so that its optimizer still knows its parameters.
        fresh: Another network of the same architecture, freshly initialised with a seed of its own: w'. Not changed.
        shrink: Factor of the old weights, in [0, 1]; 0 starts anew, 1 keeps them.
        perturb: Factor of the fresh weights, in [0, 1].

    Raises:
        ConfigError: A factor is out of range, or the networks' parameters differ in name or shape.
    """
    for option, factor in (("shrink", shrink), ("perturb", perturb)):
        options.number("shrink_and_perturb", option, factor, at_most=1)
        if factor < 0:
            raise ConfigError(f"shrink_and_perturb.{option} is a factor in [0, 1]; got {factor!r}.")
    old, new = dict(model.named_parameters()), dict(fresh.named_parameters())
    shapes, fresh_shapes = ({name: p.shape for name, p in each.items()} for each in (old, new))
    differing = sorted({name for name, _ in shapes.items() ^ fresh_shapes.items()})
    if differing:
        raise ConfigError(
            "shrink_and_perturb adds a fresh network of the same architecture, but the parameters differ in "
            f"{', '.join(differing[:5])} ({len(differing)} of {len(shapes | fresh_shapes)}). Build both with the same "
            "model, norm, width, image size and number of classes."
        )
    if model is fresh:
        raise ConfigError("shrink_and_perturb needs a second, fresh network; got the same module twice.")
    trained = [name for name, parameter in old.items() if parameter.requires_grad]
    if not trained:
        return
    weights = [old[name].detach() for name in trained]
    noise = [new[name].detach().to(old[name]) for name in trained]
    torch._foreach_mul_(weights, shrink)
    torch._foreach_add_(weights, noise, alpha=perturb)
