"""Putting layers into a network that has none: before the activation of every hidden linear layer and convolution."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from torch import nn

from fednorm.errors import ConfigError
from fednorm.optim.hidden import ACTIVATIONS, Place, WeightLayer, in_order, out_channels
from fednorm.spec import Norm

_POSITIONS_AFTER: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Conv1d, 1),
    (nn.Conv2d, 2),
    (nn.Conv3d, 3),
    (nn.ConvTranspose1d, 1),
    (nn.ConvTranspose2d, 2),
    (nn.ConvTranspose3d, 3),
)


def insert(model: nn.Module, norm: Norm, channels_last: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Put a layer before the activation of every weight layer but the last, the output layer; return where.

    Raises:
        ConfigError: There is no such layer, or where its activation stands cannot be seen.
    """
    hidden, method = hidden_weights(model), type(norm).__name__
    if not hidden:
        raise ConfigError(
            f"{type(model).__name__} has nothing that {method} could normalize: no normalization layer, and no "
            "linear layer or convolution before its last one, which is the output layer. Give a network with a "
            "hidden layer."
        )
    uses = Counter(id(place.module) for place in in_order(model))
    paths: list[str] = []
    for place in hidden:
        after = place.after
        if after is None or not is_activation(after) or uses[id(after.module)] > 1:
            raise ConfigError(_no_own_activation(place, method))
        layer = _layer_after(place, norm, channels_last)
        pair = nn.Sequential(OrderedDict(norm=layer, activation=after.module))
        pair.training = after.module.training
        parent, _, name = after.path.rpartition(".")
        model.get_submodule(parent)._modules[name] = pair
        paths.append(after.path)
    return paths


def _layer_after(place: Place, norm: Norm, channels_last: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Build the layer after a weight layer: where that is, of its type, and trained as it is."""
    weight_layer = place.module
    assert isinstance(weight_layer, WeightLayer)
    assert place.after is not None
    channels = out_channels(weight_layer)
    if isinstance(weight_layer, nn.Linear):
        # It may be applied to (N, ..., C).
        layer = channels_last(norm.layer_for(channels, (0, 1)))
    else:
        dims = next(dims for kind, dims in _POSITIONS_AFTER if isinstance(weight_layer, kind))
        layer = norm.layer(channels, dims)
    weight = weight_layer.weight
    layer.requires_grad_(any(parameter.requires_grad for parameter in weight_layer.parameters()))
    return layer.train(place.after.module.training).to(device=weight.device, dtype=weight.dtype)


def hidden_weights(model: nn.Module) -> list[Place]:
    """Return the places of the linear layers and convolutions but the last, which is the output layer."""
    return [place for place in in_order(model) if isinstance(place.module, WeightLayer)][:-1]


def is_activation(place: Place) -> bool:
    """Return whether one of PyTorch's nonlinearities stands in a place."""
    return isinstance(place.module, ACTIVATIONS)


def _no_own_activation(place: Place, method: str) -> str:
    after = place.after
    found = f"{after.path!r} ({type(after.module).__name__}) comes after it" if after else "nothing comes after it"
    if after and is_activation(after):
        found += ", and stands in other places too"
    return (
        f"{method} puts a layer between {place.path!r} ({type(place.module).__name__}) and its activation, which must "
        f"be a module of its own, registered right after it: {found}. One activation module for several layers, and "
        "functional calls such as F.relu, hide where a nonlinearity is: give every layer its own, e.g. nn.ReLU(). "
        "Where a layer is meant to have none, put the norm in by hand: make_norm(...).layer(channels, spatial_dims)."
    )
