"""What happens between a backward pass and an update, and after it, for every client of a stack by itself.

Each is the twin of an effect of :mod:`fednorm.optim`, made of that effect: the same formula with an axis of clients
before each tensor, so that no client's numbers enter another's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fednorm.federation.cohort.optimizers import by_client
from fednorm.optim.agc import AdaptiveGradientClipping, has_rows
from fednorm.optim.clip_norm import ClipNorm
from fednorm.optim.l2_init import L2Init
from fednorm.optim.projection import WeightProjection

Tensors = dict[str, Tensor]

Adjust = Callable[[Mapping[str, Tensor], Tensors], None]
"""Changes the gradients (second) of parameters (first), by key, shape (K, ...), in place or by putting others there."""

After = Callable[[Tensors], None]
"""Changes parameters in place."""

_SMALLEST_NORM = 1e-6


def _length(tensor: Tensor, axes: int) -> Tensor:
    """Return the Euclidean norms over all but the first axes, of the shape of these."""
    if tensor.ndim <= axes:
        return tensor.abs()
    lengths: Tensor = torch.linalg.vector_norm(tensor.flatten(axes), dim=axes)
    return lengths


class StackedL2Init:
    """:class:`~fednorm.optim.l2_init.L2Init` for a stack."""

    def __init__(self, effect: L2Init, keys: Mapping[int, str]) -> None:
        named = zip(effect.parameters, effect.anchors, strict=True)
        self.anchors = {keys[id(p)]: anchor for p, anchor in named if id(p) in keys}
        self.strength = effect.strength

    def __call__(self, parameters: Mapping[str, Tensor], gradients: Tensors) -> None:
        """Add ``2 * strength * (w - w_0)`` to every gradient."""
        for key, gradient in gradients.items():
            gradient.add_(parameters[key] - self.anchors[key], alpha=2 * self.strength)


class StackedAGC:
    """:class:`~fednorm.optim.agc.AdaptiveGradientClipping` for a stack: unit by unit, client by client."""

    def __init__(self, effect: AdaptiveGradientClipping, keys: Mapping[int, str]) -> None:
        self.clipping, self.eps = effect.clipping, effect.eps
        self.axes = {keys[id(p)]: 1 + has_rows(p, effect.units) for p in effect.parameters if id(p) in keys}

    def __call__(self, parameters: Mapping[str, Tensor], gradients: Tensors) -> None:
        """Shorten the gradients of units that are too long."""
        for key, gradient in gradients.items():
            if key not in self.axes:
                continue
            axes = self.axes[key]
            bound = _length(parameters[key], axes).clamp_min_(self.eps).mul_(self.clipping)
            length = _length(gradient, axes)
            factor = torch.where(length > bound, bound / length.clamp_min(_SMALLEST_NORM), 1.0)
            gradient.mul_(by_client(factor, gradient))


class StackedClipNorm:
    """:class:`~fednorm.optim.clip_norm.ClipNorm` for a stack: the whole gradient of each client."""

    def __init__(self, effect: ClipNorm, keys: Mapping[int, str]) -> None:
        del keys
        self.largest = effect.largest

    def __call__(self, parameters: Mapping[str, Tensor], gradients: Tensors) -> None:
        """Shorten each client's gradient to at most ``largest``."""
        del parameters
        if not gradients:
            return
        lengths = torch.stack([_length(gradient, 1) for gradient in gradients.values()], dim=1)
        length = torch.linalg.vector_norm(lengths, dim=1)
        factor = torch.where(length > self.largest, self.largest / length, 1.0)
        for gradient in gradients.values():
            gradient.mul_(by_client(factor, gradient))


class StackedProjection:
    """:class:`~fednorm.optim.projection.WeightProjection` for a stack, after every update."""

    def __init__(self, effect: WeightProjection, keys: Mapping[int, str]) -> None:
        groups = [*effect.weights, *effect.joint]
        self.groups = [tuple(keys[id(tensor)] for tensor in group) for group in groups]
        self.radii = [*effect.radii.values(), *(math.sqrt(group[0].numel()) for group in effect.joint)]
        self.scales = [keys[id(tensor)] for tensor in effect.scales]
        self.shifts = [keys[id(tensor)] for tensor in effect.shifts]
        self.decay = effect.decay

    def __call__(self, parameters: Tensors) -> None:
        """Bring each client's weights to their radii, and its scales and shifts a little to 1 and 0."""
        for group, radius in zip(self.groups, self.radii, strict=True):
            lengths = torch.stack([_length(parameters[key], 1) for key in group], dim=1)
            length = torch.linalg.vector_norm(lengths, dim=1).clamp_min_(1e-30)
            for key in group:
                parameters[key].mul_(by_client(radius / length, parameters[key]))
        for key in self.scales:
            parameters[key].mul_(self.decay).add_(1.0 - self.decay)
        for key in self.shifts:
            parameters[key].mul_(self.decay)


ADJUST: Mapping[type, Callable[..., Adjust]] = {
    L2Init: StackedL2Init,
    AdaptiveGradientClipping: StackedAGC,
    ClipNorm: StackedClipNorm,
}
"""The twin of each effect on gradients; of the type itself."""


def keys_by_identity(model: nn.Module, keys: Sequence[str]) -> dict[int, str]:
    """Return, for the parameters of a model that have one of the keys, the key by the parameter's identity."""
    wanted = frozenset(keys)
    return {id(parameter): key for key, parameter in model.named_parameters() if key in wanted}
