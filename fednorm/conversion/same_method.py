"""Converting to the method that a layer is of already: the layer stays, with its options, unless others are given.

An option that a caller names is the caller's; every other is the layer's own. So ``convert(model, "batch_norm")`` keeps
each layer's eps, momentum (also None, the cumulative average), ``affine=False`` and ``track_running_stats=False``, and
``convert(model, "group_norm", eps=1e-3)`` keeps each layer's number of groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.cards import NORMS
from fednorm.conversion.surroundings import own_tensors
from fednorm.errors import ConfigError
from fednorm.norms import spec_of
from fednorm.recognition.layers import Recognition, eps_name
from fednorm.roles import Kind
from fednorm.spec import Norm

_SETTABLE = ("eps", "momentum")


class SameMethod:
    """What a conversion does to layers that are the method's already.

    Args:
        norm: The method.
        given: The options that the caller gave; every other is the layer's own.
    """

    def __init__(self, norm: Norm, given: Collection[str]) -> None:
        self.norm = norm
        self.given = frozenset(given)
        card = next((card for card in NORMS if card.make is type(norm)), None)
        self.name, self._convolution = ("", None) if card is None else (card.name, card.convolution)

    def applies(self, layer: nn.Module, known: Recognition) -> bool:
        """Return whether a layer is of the method; batch normalization by constants is batch normalization.

        ``layer_norm_channels`` is layer normalization that is not over whole samples.
        """
        name = known.spec.name if known.spec is not None else "batch_norm"
        if {name, self.name} == {"layer_norm", "layer_norm_channels"}:
            return not isinstance(layer, nn.GroupNorm)
        return name == self.name

    def settle(self, layer: nn.Module, known: Recognition) -> bool:
        """Give a layer of the method the options that were given; return False where it must be built anew."""
        if known.spec is None or isinstance(layer, nn.SyncBatchNorm):
            return False  # neither trains alone, on a CPU
        own = self._options_of(layer)
        other = {name for name in self.given if name not in own or own[name] != getattr(self.norm, name)}
        names = {name: eps_name(layer) if name == "eps" else name for name in other & set(_SETTABLE)}
        if other - set(names) or not all(name in vars(layer) for name in names.values()):
            return False
        for option, name in names.items():
            setattr(layer, str(name), getattr(self.norm, option))
        return True

    def build(self, layer: nn.Module, known: Recognition, channels: int, dims: Collection[int]) -> nn.Module:
        """Return a new layer with the given options, and with the old one's others, tensors and omissions.

        Raises:
            ConfigError: An option does not fit the layer.
        """
        own = self._options_of(layer)
        new = self._fitted(own).layer_for(channels, dims)
        if isinstance(new, nn.modules.batchnorm._NormBase) and "momentum" not in self.given:
            new.momentum = getattr(layer, "momentum", new.momentum)
        tensors = own_tensors(layer)
        if known.spec is not None and isinstance(new, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            _omit(new, tensors)
        _carry_over(tensors, known, new)
        return new

    def conv_norm(self, conv: nn.Conv2d) -> Norm | None:
        """Return the method with a standardized convolution's own options; None where the convolution may stay."""
        if self._convolution is not type(conv):
            return self.norm
        own = {**self._options_of(conv), "gain": getattr(conv, "gain", None) is not None}
        if all(own[name] == getattr(self.norm, name) for name in self.given if name in own):
            return None
        return self._fitted(own)

    def _options_of(self, layer: nn.Module) -> dict[str, Any]:
        """Return the method's options as a layer has them, those that it shows."""
        own = {f.name: getattr(layer, f.name) for f in dataclasses.fields(self.norm) if hasattr(layer, f.name)}
        if "eps" not in own and eps_name(layer) is not None:
            own["eps"] = getattr(layer, str(eps_name(layer)))
        if hasattr(self.norm, "over") and isinstance(layer, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            own.setdefault("over", "sample" if isinstance(layer, nn.GroupNorm) else "channels")
        return own

    def _fitted(self, own: dict[str, Any]) -> Norm:
        norm = self.norm
        for name in {f.name for f in dataclasses.fields(norm)} & set(own) - self.given:
            try:
                norm = dataclasses.replace(norm, **{name: own[name]})
            except ConfigError:  # what the method's options do not allow, such as an eps of 0 or no momentum
                continue
        return norm


def normalizes_positions(layer: nn.Module) -> bool:
    """Return whether a layer is layer or RMS normalization over the channels of each position by itself."""
    return isinstance(layer, nn.LayerNorm | nn.RMSNorm) or getattr(layer, "over", "") == "channels"


def _omit(new: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Leave out of a layer what the old one did not have: scale, shift, running statistics."""
    for name in [name for name in new._parameters if name not in tensors]:
        new.register_parameter(name, None)
    for name in [name for name in new._buffers if name not in tensors]:
        new.register_buffer(name, None)
        vars(new)["track_running_stats"] = False
    for flag in ("affine", "elementwise_affine"):
        if flag in vars(new):
            vars(new)[flag] = bool(new._parameters.get("weight") is not None)


@torch.no_grad()
def _carry_over(tensors: dict[str, Tensor], known: Recognition, new: nn.Module) -> None:
    """Copy tensors of one name, or of one kind, to a layer of the same method."""
    card = spec_of(new)
    kinds = {} if card is None else {tensor.kind: name for name, tensor in card.tensors.items()}
    fitting = own_tensors(new)
    for name, tensor in tensors.items():
        kind = known.spec.tensors[name].kind if known.spec is not None and name in known.spec.tensors else None
        twin = fitting.get(name, fitting.get(kinds.get(kind, ""))) if kind is not None else fitting.get(name)
        if twin is not None and twin.numel() == tensor.numel() and not (tensor.is_meta or twin.is_meta):
            offset = known.offset if kind is Kind.SCALE else 0.0
            twin.copy_(tensor.reshape(twin.shape) + offset if offset else tensor.reshape(twin.shape))
