"""Hyperspherical weights: after every update each unit's incoming weights are brought to length 1.

Lee, Lee, Seno, Kim, Stone, Choo. Hyperspherical Normalization for Scalable Deep Reinforcement Learning (SimbaV2).
ICML 2025. https://arxiv.org/abs/2502.15280. Official code: dojeon-ai/SimbaV2.

    w_i <- w_i / max(||w_i||_2, 1e-8)      for each output i of a hidden layer, along its inputs

A convolution's inputs are its channels and kernel positions together. Biases, and scales and shifts of normalization
layers, are left alone: SimbaV2 has no biases, and its learned scalers are what scales are here. Optimizers' moments are
not projected, as in the official code.

NaP's projection (``train.project``) keeps the initial length of a layer's weights as a whole, and only where a
normalization follows; this one has the same length for every unit of every layer. Before a norm with moments a channel
(``batch_norm``, ``instance_norm``) no function changes by it; before others it does.

Differs: what makes SimbaV2 a network (unit-length features, interpolated residuals, orthogonal initial weights) is not
here, so that this is its projection alone. The output layer is left free: SimbaV2 has a scaler behind it, which takes
logits to any size. Initial weights are projected at the first update, not before it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.optim.hidden import WeightLayer, in_order

SMALLEST = 1e-8
"""The least length that is divided by, as in the official code."""


class Hyperspherical:
    """Projects the rows of a model's hidden weights to length 1; called after each update.

    Weights that are not trained (``requires_grad`` False at the time) are left alone, and so are those
    that ``torch.nn.utils.parametrize`` computes.

    Args:
        model: The model. Its last linear layer or convolution, in order of registration, is the output layer.

    Attributes:
        weights: What is projected, by the layer's path.

    Raises:
        ConfigError: There is nothing to project.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [(place.path, place.module) for place in in_order(model) if isinstance(place.module, WeightLayer)]
        output = layers[-1][1] if layers else None
        own = {
            path: layer._parameters["weight"]
            for path, layer in layers
            if layer is not output and layer._parameters.get("weight") is not None
        }
        self.weights: dict[str, Tensor] = {path: weight for path, weight in own.items() if weight is not None}
        if not self.weights:
            raise ConfigError(
                f"train.hyperspherical projects the weights of hidden layers, and {type(model).__name__} has none: no "
                "linear layer or convolution before the output layer whose weight is a parameter of its own. Leave it "
                "at false."
            )

    @torch.no_grad()
    def __call__(self) -> None:
        """Bring every row to length 1, in place."""
        for weight in self.weights.values():
            if weight.requires_grad:
                axes = tuple(range(1, weight.ndim))
                weight.div_(torch.linalg.vector_norm(weight, dim=axes, keepdim=True).clamp_min_(SMALLEST))
