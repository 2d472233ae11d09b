"""L2 toward zero of the normalization layers' scales, and of nothing else.

    loss + strength * sum ||gamma||^2,     gradient + 2 * strength * gamma

over every learned scale gamma, with the factor 2 that follows from the formula, as in :mod:`fednorm.optim.l2_init`. A
control without a paper of its own: behind a normalization the weights' length does nothing, and weight decay on them
only sets the effective learning rate (van Laarhoven, https://arxiv.org/abs/1706.05350); what decay does to the function
itself, it does through the scales. NaP (https://arxiv.org/abs/2407.01800) pulls them to 1 instead, which is
``train.project``. Together with ``train.weight_decay`` the scales have both.

An effect on the gradients, between backward and update, before clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.roles import Kind


class L2Scales:
    """Adds the gradient of ``strength * sum ||gamma||^2`` to the gradients of a model's scales.

    Args:
        model: The model.
        strength: lambda, greater than 0.

    Attributes:
        scales: Every learned scale of its normalization layers, each once. Those that are not trained
            (``requires_grad`` False at the time of a step) are left alone.

    Raises:
        ConfigError: ``strength`` is not greater than 0, or the model has no scale.
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        options.number("train", "l2_scales", strength, above=0)
        self.strength = strength
        self.scales: list[nn.Parameter] = []
        for module in model.modules():
            spec = spec_of(module)
            for name, parameter in module.named_parameters(recurse=False):
                scale = spec is not None and name in spec.tensors and spec.tensors[name].kind is Kind.SCALE
                if scale and all(parameter is not known for known in self.scales):
                    self.scales.append(parameter)
        if not self.scales:
            raise ConfigError(
                f"train.l2_scales pulls the scales of normalization layers to 0, and {type(model).__name__} has none. "
                "Leave it at 0, or take a norm with a learned scale, e.g. batch_norm."
            )

    @torch.no_grad()
    def __call__(self) -> None:
        """Add ``2 * strength * gamma`` to every scale's gradient; where the loss gave none, this is the gradient."""
        for scale in self.scales:
            if not scale.requires_grad:
                continue
            pull: Tensor = 2 * self.strength * scale
            scale.grad = pull if scale.grad is None else scale.grad.add_(pull)
