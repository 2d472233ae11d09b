"""Weight clipping: after every update no weight is larger than a multiple of its initial bound.

Elsayed, Lan, Lyle, Mahmood. Weight Clipping for Deep Continual and Reinforcement Learning. RLC 2024.
https://arxiv.org/abs/2407.01704 (Algorithm 1). Official code: mohmdelsayed/weight-clipping.

    w <- min(max(w, -kappa s), kappa s),     s = 1 / sqrt(fan_in)

for every weight and bias of a linear layer or convolution, the output layer included; s is the bound of PyTorch's
initial distribution, and a bias has its weight's. A convolution's fan-in is inputs a group times kernel positions. It
follows any optimizer, so that its moments do not know of it: all as in the official code.

Differs: scales and shifts of normalization layers are left alone. The official code gives a vector the bound of the
matrix before it, which would take a scale of 1 far down; its networks have no normalization. Weights that begin
outside their bound (another initialisation than PyTorch's, a trained network's) are inside it from the first update on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.optim.hidden import WeightLayer


class WeightClipping:
    """Clips the weights and biases of a model's linear layers and convolutions; called after each update.

    Parameters that are not trained (``requires_grad`` False at the time) are left alone.

    Args:
        model: The model.
        kappa: The multiple of the initial bound, greater than 0; 1 to 5 in the paper.

    Attributes:
        bounds: Of each clipped parameter, with it.

    Raises:
        ConfigError: ``kappa`` is not greater than 0, or the model has no such layer.
    """

    def __init__(self, model: nn.Module, kappa: float) -> None:
        options.number("train", "weight_clip", kappa, above=0)
        self.bounds: list[tuple[nn.Parameter, float]] = []
        seen: set[int] = set()
        for module in model.modules():
            if not isinstance(module, WeightLayer):
                continue
            weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
            # Of a parametrized layer the tensor that is trained stands elsewhere, and its size is not the weight's.
            if weight is None:
                continue
            bound = kappa / math.sqrt(weight[0].numel())
            for parameter in (weight, bias):
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.bounds.append((parameter, bound))
        if not self.bounds:
            raise ConfigError(
                f"train.weight_clip bounds the weights of linear layers and convolutions, and {type(model).__name__} "
                "has none. Leave it at 0."
            )

    @torch.no_grad()
    def __call__(self) -> None:
        """Clip every weight to its bound."""
        trained = [(parameter, bound) for parameter, bound in self.bounds if parameter.requires_grad]
        if not trained:
            return
        parameters: list[Tensor] = [parameter for parameter, _ in trained]
        bounds = [bound for _, bound in trained]
        torch._foreach_clamp_max_(parameters, bounds)
        torch._foreach_clamp_min_(parameters, [-bound for bound in bounds])
