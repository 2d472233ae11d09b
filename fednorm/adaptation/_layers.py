"""What methods of test-time adaptation act on: batch normalization's statistics, and normalization's affine tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.norms._batch import batch_norm, per_channel
from fednorm.roles import STATISTICS, Kind

AFFINE = frozenset({Kind.SCALE, Kind.SHIFT, Kind.GAIN})
"""The kinds of tensors that scale and shift what is normalized; of scaled weight standardization its gains."""

MOMENTS = STATISTICS - {Kind.COUNT}

_SHAPES: tuple[tuple[type[_BatchNorm], tuple[int, ...]], ...] = (
    (nn.BatchNorm1d, ()),
    (nn.BatchNorm2d, (2, 2)),
    (nn.BatchNorm3d, (2, 2, 2)),
    (_BatchNorm, (2, 2)),
)


def keeps_moments(module: nn.Module) -> bool:
    """Return whether a layer is a normalization with running statistics other than a count."""
    spec, own = spec_of(module), dict(module.named_buffers(recurse=False))
    return spec is not None and any(t.kind in MOMENTS and own.get(key) is not None for key, t in spec.tensors.items())


def statistics_layers(model: nn.Module, method: str) -> dict[str, _BatchNorm]:
    """Return the layers that normalize their input by a running mean and variance in evaluation, by path.

    Args:
        model: The network.
        method: Who asks, for the error.

    Raises:
        ConfigError: A layer keeps running statistics and does something else with them.
    """
    layers: dict[str, _BatchNorm] = {}
    for path, module in model.named_modules():
        spec = spec_of(module)
        if spec is None or not keeps_moments(module):
            continue
        if not isinstance(module, _BatchNorm) or not is_plain(module):
            raise ConfigError(
                f"Adaptation {method!r} replaces the running mean and variance by which batch normalization evaluates, "
                f"and {path or 'the network'} ({type(module).__name__}, {spec.name}) evaluates by another formula. "
                "Take norm 'batch_norm', or leave this adaptation out of evaluate.adaptation."
            )
        layers[path] = module
    return layers


def require_statistics(model: nn.Module, method: str) -> None:
    """Refuse a network without running statistics.

    Raises:
        ConfigError: There are none, or a layer does something else with them.
    """
    if not statistics_layers(model, method):
        raise ConfigError(
            f"Adaptation {method!r} re-estimates the running statistics of batch normalization, and the network has "
            "none. Take norm 'batch_norm', an adaptation that does without ('tent' and 'atp' adapt what any "
            "normalization has), or leave it out of evaluate.adaptation."
        )


def is_plain(layer: _BatchNorm) -> bool:
    """Return whether a layer in evaluation is (x - M) / sqrt(V + eps) * scale + shift of its input, and no more."""
    mean, var = running(layer)
    sides = next(sides for kind, sides in _SHAPES if isinstance(layer, kind))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, layer.num_features, *sides, generator=draw).to(mean)
    with torch.no_grad():
        y = copy.deepcopy(layer).eval()(x)
        return torch.allclose(y, functional.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps), 1e-3)


def affine_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the learned scales and shifts of normalization layers, and the gains of weights, by key."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        spec = spec_of(module)
        for name, parameter in module.named_parameters(recurse=False) if spec else ():
            if spec and name in spec.tensors and spec.tensors[name].kind in AFFINE:
                found[f"{path}.{name}" if path else name] = parameter
    return found


def running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a layer that has them."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def replace_forward(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """Let a layer of a copied network compute something else; its hooks and its place stay."""
    layer.__dict__["forward"] = forward


def values_per_channel(x: Tensor) -> int:
    """Return how many values a batch has of each channel."""
    return x.numel() // x.shape[1]


def moments(x: Tensor, *, correction: int = 0) -> tuple[Tensor, Tensor]:
    """Return a batch's mean and variance by channel, each (C,), of an input (N, C, ...).

    Args:
        x: The input.
        correction: 1 for the unbiased variance; of one value it is 0 either way.
    """
    axes = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(x, axes, correction=correction if values_per_channel(x) > 1 else 0)
    return mean, var


def normalized(layer: _BatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return a layer's output under given statistics, with the kernel that evaluation uses; for no gradient of them."""
    return batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)


def by_batch(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Return what normalizes by the batch's own moments, as in training, gradients through them included.

    Of one value per channel the moments are that value and 0, so that the shift alone is left.
    """

    def forward(x: Tensor) -> Tensor:
        if values_per_channel(x) > 1:
            return batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
        y = x - x
        if layer.weight is not None:
            y = y * per_channel(layer.weight, x)
        return y if layer.bias is None else y + per_channel(layer.bias, x)

    return forward


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row's softmax, in nats, (B,); classes that are masked (-inf) have no part in it."""
    log_p = logits.log_softmax(1)
    return -(logits.softmax(1) * log_p.masked_fill(logits.isneginf(), 0.0)).sum(1)
