"""Initial scales of normalization layers: each norm's own, or drawn from U(0, 1).

Frankle, Schwab, Morcos. Training BatchNorm and Only BatchNorm. ICLR 2021. https://arxiv.org/abs/2003.00152 (section 3):
there the scales of batch normalization begin as

    gamma ~ U(0, 1),  beta = 0

``train.scale_init = "uniform"`` draws every scale that its method has begin at 1; the others (a tanh's steepness, a
gate, a scale that is added to 1) keep their method's values, as shifts do.
"""

from __future__ import annotations

import torch
from torch import nn

from fednorm.errors import ConfigError
from fednorm.rng import torch_stream
from fednorm.roles import Kind
from fednorm.training.trainable import kinds_of_norms


@torch.no_grad()
def draw_scales(model: nn.Module, seed: int) -> None:
    """Draw the scales of a network's normalization layers from U(0, 1), each from a stream of its own key.

    Args:
        model: The network, with initial weights.
        seed: Of the streams ``(seed, "model", "scales", key)``.

    Raises:
        ConfigError: No normalization layer has scales that begin at 1.
    """
    parameters = dict(model.named_parameters())
    scales = [
        key
        for key, kind in kinds_of_norms(model).items()
        if kind is Kind.SCALE and key in parameters and bool((parameters[key] == 1).all())
    ]
    if not scales:
        raise ConfigError(
            "train.scale_init = 'uniform' draws the scales of normalization layers, and "
            f"{type(model).__name__} has none that begin at 1. Take a norm that has them, such as batch_norm, or "
            "train.scale_init = 'own'."
        )
    for key in scales:
        drawn = torch.rand(parameters[key].shape, generator=torch_stream(seed, "model", "scales", key))
        parameters[key].copy_(drawn)
