"""``convert``: any torchvision, timm or own model with its normalization replaced.

Layers are found by type, never by name. The given model is left as it is; the result is a copy of it in which

* every normalization layer is what the method puts there (an identity for ``none`` and ``sws``);
* every ``nn.Conv2d`` is the method's convolution, where the method has one, with the old weight and geometry;
* every activation *module* carries the method's constant, where the method has one;
* what the method does to a network built with it is done (:meth:`~fednorm.spec.Norm.prepare`: ``nap`` removes biases).

A network without normalization layers is refused, but for a method that wants a layer before every nonlinearity
(``nap``): there, each activation module that follows a hidden linear layer or convolution gets one before it.

What is kept: weights and biases of convolutions and linear layers, devices, types, training mode, ``requires_grad``,
modules that occur in several places. What is not: scale, shift and running statistics of the old normalization layers,
unless old and new are the same method; they were learned for a function that is no longer there.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fednorm.errors import ConfigError
from fednorm.norms import make_norm, spec_of
from fednorm.norms.layer_norm import ChannelLayerNorm
from fednorm.norms.sws import ScaledActivation, SWSConv2d
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.optim.hidden import ACTIVATIONS, Place, WeightLayer, in_order, out_channels
from fednorm.rng import torch_seeded
from fednorm.spec import Norm

_ACTIVATION_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.Tanh: "tanh",
    nn.LeakyReLU: "leaky_relu",
}
_CONSTANTLESS = (nn.Hardswish, nn.Mish, nn.PReLU, nn.SELU, nn.CELU, nn.Softplus)
_SPATIAL_DIMS: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.BatchNorm2d, 2),
    (nn.BatchNorm3d, 3),
    (nn.InstanceNorm1d, 1),
    (nn.InstanceNorm2d, 2),
    (nn.InstanceNorm3d, 3),
)
_POSITIONS_AFTER: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Linear, 0),
    (nn.Conv1d, 1),
    (nn.Conv2d, 2),
    (nn.Conv3d, 3),
    (nn.ConvTranspose1d, 1),
    (nn.ConvTranspose2d, 2),
    (nn.ConvTranspose3d, 3),
)


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        norm: The method that was put in.
        layers: Paths of the normalization layers that were replaced.
        inserted: Paths of the activations before which a layer was put, in a network that had none.
        convolutions: Paths of the convolutions that were rebuilt.
        activations: Paths of the activations that were multiplied by their constant.
        notes: What a reader of the results should know, one sentence each.
    """

    norm: Norm
    layers: list[str] = field(default_factory=list)
    inserted: list[str] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ChannelsLast(nn.Module):
    """Applies a layer for (N, C, L) to an input whose channels are last: (N, C) or (N, ..., C).

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        if x.ndim == 2:
            flat: Tensor = self.layer(x.unsqueeze(-1))
            return flat.squeeze(-1)
        flat = self.layer(x.flatten(1, -2).transpose(1, 2))
        return flat.transpose(1, 2).reshape(x.shape)


def convert(model: nn.Module, norm: str | Norm, **options: Any) -> nn.Module:
    """Return a copy of a model with its normalization replaced by another method.

    Args:
        model: The model; it is not changed.
        norm: Name of the method, or a configured :class:`~fednorm.spec.Norm`.
        **options: The method's options, where ``norm`` is a name.

    Returns:
        The converted copy.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: An option is wrong, a layer cannot be converted, or nothing would change.
    """
    return convert_with_report(model, norm, **options)[0]


def convert_with_report(model: nn.Module, norm: str | Norm, **options: Any) -> tuple[nn.Module, ConversionReport]:
    """Do what :func:`convert` does, and say what was done.

    Returns:
        The converted copy and the report.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: An option is wrong, a layer cannot be converted, or nothing would change.
    """
    if isinstance(norm, str):
        norm = make_norm(norm, options)
    elif options:
        raise ConfigError(f"Options ({', '.join(options)}) go with a method's name; {norm!r} has its own already.")
    _require_initialized(model)
    conversion = _Conversion(norm)
    # Building layers draws initial weights; the caller's generator must not notice.
    with torch_seeded(0, "convert"):
        converted = conversion.complete(conversion.convert(copy.deepcopy(model)))
    conversion.finish(model)
    return converted, conversion.report


def _require_initialized(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
            raise ConfigError(
                f"Layer {path or 'the model itself'!r} ({type(module).__name__}) does not know its shape yet. "
                "Run one forward pass through a model with lazy layers before converting it."
            )


class _Conversion:
    """One walk over one model, in module order."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm
        self.report = ConversionReport(norm)
        self.rebuilds_convolutions = type(norm).conv_layer is not Norm.conv_layer or not norm.shifts
        self.normalizes = type(norm).layer is not Norm.layer
        self.done: dict[int, nn.Module] = {}
        self.kept: list[nn.Module] = []
        self.positions = 2
        self.unscaled: set[str] = set()

    def convert(self, module: nn.Module, path: str = "") -> nn.Module:
        """Return what stands for a module; its descendants are converted in place."""
        if id(module) in self.done:
            return self.done[id(module)]
        if not self.normalizes and vars(module).get("inplace") is True:
            # Behind an identity it would overwrite what the layer before it left for others, e.g. a shortcut.
            vars(module)["inplace"] = False
        replace = self._replacement(module)
        if replace is None:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = self.convert(child, f"{path}.{name}" if path else name)
            new = module
        else:
            new = replace(module, path)
            new.train(module.training)
        self.kept.append(module)  # an id is only unique while its object lives
        self.done[id(module)] = new
        return new

    def complete(self, model: nn.Module) -> nn.Module:
        """Insert layers into a converted network that had none, where the method wants that; then prepare it."""
        if self.norm.inserts and not self.report.layers:
            self._insert(model)
        elif self.norm.inserts:
            bare = [place.after.path for place in _hidden_weights(model) if place.after and _is_activation(place.after)]
            if bare:
                self.report.notes.append(
                    f"Only the network's own layers were replaced; none stands before: {', '.join(bare)}."
                )
        before = [key for key, _ in model.named_parameters()]
        prepared = self.norm.prepare(model)
        kept = {key for key, _ in prepared.named_parameters()}
        removed = [key for key in before if key not in kept]
        if removed:
            self.report.notes.append(f"Removed, as {type(self.norm).__name__} has it: {', '.join(removed)}.")
        return prepared

    def _insert(self, model: nn.Module) -> None:
        """Put a layer before the activation of every weight layer but the last, the output layer.

        Raises:
            ConfigError: There is no such layer, or where its activation stands cannot be seen.
        """
        hidden, method = _hidden_weights(model), type(self.norm).__name__
        if not hidden:
            raise ConfigError(
                f"{type(model).__name__} has nothing that {method} could normalize: no normalization layer, and no "
                "linear layer or convolution before its last one, which is the output layer. Give a network with a "
                "hidden layer."
            )
        uses = Counter(id(place.module) for place in in_order(model))
        for place in hidden:
            after = place.after
            if after is None or not _is_activation(after) or uses[id(after.module)] > 1:
                raise ConfigError(_no_own_activation(place, method))
            pair = nn.Sequential(OrderedDict(norm=self._layer_after(place), activation=after.module))
            parent, _, name = after.path.rpartition(".")
            model.get_submodule(parent)._modules[name] = pair.train(after.module.training)
            self.report.inserted.append(after.path)

    def _layer_after(self, place: Place) -> nn.Module:
        weight_layer = place.module
        assert isinstance(weight_layer, WeightLayer)
        channels = out_channels(weight_layer)
        if isinstance(weight_layer, nn.Linear):
            # It may be applied to (N, ..., C).
            layer: nn.Module = ChannelsLast(self.norm.layer(channels, 1))
        else:
            dims = next(dims for kind, dims in _POSITIONS_AFTER if isinstance(weight_layer, kind))
            layer = self.norm.layer(channels, dims)
        return layer.to(device=weight_layer.weight.device, dtype=weight_layer.weight.dtype)

    def finish(self, before: nn.Module) -> None:
        """Refuse a conversion that did nothing, and write the notes."""
        report, name = self.report, type(before).__name__
        if not report.layers and not report.inserted and (self.normalizes or not report.convolutions):
            raise ConfigError(
                f"{name} has no normalization layer that {type(self.norm).__name__} could replace, so converting it "
                "would change nothing. Give a model with one of nn.BatchNorm*, nn.GroupNorm, nn.LayerNorm or "
                "nn.InstanceNorm* (functional calls cannot be seen), or build it with the norm in the first place."
            )
        if self.norm.residual_alpha is not None:
            report.notes.append(
                "Residual scaling (alpha, beta, skip gains) is not applied: where a foreign model adds its branches is "
                "not visible. fednorm's own residual models have it."
            )
        if self._scales_activations() and not report.activations:
            report.notes.append("No activation module was found to scale; functional activations cannot be seen.")
        if self.unscaled:
            report.notes.append(f"Left without a constant, for want of one: {', '.join(sorted(self.unscaled))}.")
        if self.rebuilds_convolutions:
            other = [type(m).__name__ for m in before.modules() if isinstance(m, _OTHER_CONVOLUTIONS)]
            if other:
                report.notes.append(f"Only nn.Conv2d is converted; left as they are: {', '.join(sorted(set(other)))}.")

    def _replacement(self, module: nn.Module) -> Callable[[nn.Module, str], nn.Module] | None:
        spec = spec_of(module)
        self.positions = next((dims for kind, dims in _POSITIONS_AFTER if isinstance(module, kind)), self.positions)
        if spec is not None and spec.normalizes:
            return self._layer
        if isinstance(module, nn.Conv2d) and (self.rebuilds_convolutions or isinstance(module, SWSConv2d | WSConv2d)):
            return self._conv
        if isinstance(module, ScaledActivation):
            return self._unwrapped
        if type(module) in _ACTIVATION_NAMES or isinstance(module, _CONSTANTLESS):
            return self._activation
        return None

    def _layer(self, old: nn.Module, path: str) -> nn.Module:
        """Build the layer that replaces a normalization layer, together with what the old one had fused into it."""
        num_channels, spatial_dims, channels_last = _shape_of(old, path, self.positions)
        try:
            new = self.norm.layer(num_channels, 1 if channels_last else spatial_dims)
        except ConfigError as error:
            raise ConfigError(f"Layer {path or 'the model itself'!r} ({type(old).__name__}): {error}") from error
        like = next(old.parameters(recurse=False), next(old.buffers(recurse=False), None))
        if like is not None:
            new.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        _carry_over(old, new)
        if channels_last and not isinstance(new, nn.Identity):
            new = ChannelsLast(new)
        self.report.layers.append(path)
        fused = [
            self.convert(child, f"{path}.{name}" if path else name)
            for name, child in old.named_children()
            if not isinstance(child, nn.Identity)
        ]
        return nn.Sequential(new, *fused) if fused else new

    def _conv(self, old: nn.Module, path: str) -> nn.Module:
        """Build the method's convolution with the old one's weight and geometry."""
        assert isinstance(old, nn.Conv2d)
        try:
            new = self.norm.conv(
                old.in_channels,
                old.out_channels,
                (old.kernel_size[0], old.kernel_size[1]),
                stride=(old.stride[0], old.stride[1]),
                padding=old.padding if isinstance(old.padding, str) else (old.padding[0], old.padding[1]),
                dilation=(old.dilation[0], old.dilation[1]),
                groups=old.groups,
                bias=old.bias is not None,
                padding_mode=old.padding_mode,
            )
        except ConfigError as error:
            raise ConfigError(f"Convolution {path or 'the model itself'!r}: {error}") from error
        self.report.convolutions.append(path)
        if type(new) is nn.Conv2d and not isinstance(old, SWSConv2d | WSConv2d):
            if old.bias is None and new.bias is not None:
                old.bias = nn.Parameter(old.weight.new_zeros(old.out_channels), old.weight.requires_grad)
            return old
        _require_plain(old, path)
        new.to(device=old.weight.device, dtype=old.weight.dtype)
        new.weight.requires_grad_(old.weight.requires_grad)
        with torch.no_grad():
            new.weight.copy_(old.weight)
            if new.bias is not None:
                # A bias the old layer did not have starts at 0, so that the function changes by the norm alone.
                new.bias.zero_() if old.bias is None else new.bias.copy_(old.bias)
        if new.bias is not None and old.bias is not None:
            new.bias.requires_grad_(old.bias.requires_grad)
        return new

    def _unwrapped(self, old: nn.Module, path: str) -> nn.Module:
        """Take an earlier conversion's constant off, then treat what is left as any other activation."""
        assert isinstance(old, ScaledActivation)
        return self.convert(old.activation, path)

    def _activation(self, old: nn.Module, path: str) -> nn.Module:
        """Multiply an activation by the method's constant, and keep its settings."""
        if not self._scales_activations():
            return old
        name = _ACTIVATION_NAMES.get(type(old))
        if name is None:
            self.unscaled.add(type(old).__name__)
            return old
        scaled = self.norm.activation(name)
        if not isinstance(scaled, ScaledActivation):
            return old
        self.report.activations.append(path)
        return ScaledActivation(old, scaled.gamma)

    def _scales_activations(self) -> bool:
        return isinstance(self.norm.activation("relu"), ScaledActivation)


_OTHER_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def _hidden_weights(model: nn.Module) -> list[Place]:
    """Return the places of the linear layers and convolutions but the last, which is the output layer."""
    return [place for place in in_order(model) if isinstance(place.module, WeightLayer)][:-1]


def _is_activation(place: Place) -> bool:
    return isinstance(place.module, ACTIVATIONS)


def _no_own_activation(place: Place, method: str) -> str:
    after = place.after
    found = f"{after.path!r} ({type(after.module).__name__}) comes after it" if after else "nothing comes after it"
    if after and _is_activation(after):
        found += ", and stands in other places too"
    return (
        f"{method} puts a layer between {place.path!r} ({type(place.module).__name__}) and its activation, which must "
        f"be a module of its own, registered right after it: {found}. One activation module for several layers, and "
        "functional calls such as F.relu, hide where a nonlinearity is: give every layer its own, e.g. nn.ReLU(). "
        "Where a layer is meant to have none, put the norm in by hand: make_norm(...).layer(channels, spatial_dims)."
    )


def _shape_of(layer: nn.Module, path: str, positions: int) -> tuple[int, int, bool]:
    """Return C, the number of axes after it, and whether the channels are the last axis instead of the second."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        shape = layer.normalized_shape
        if len(shape) > 1:
            return shape[0], len(shape) - 1, False
        # torchvision and timm both name the channels-first descendants of nn.LayerNorm with a trailing 2d.
        channels_first = isinstance(layer, ChannelLayerNorm) or type(layer).__name__.endswith("2d")
        return (shape[0], 2, False) if channels_first else (shape[0], positions, True)
    num_channels = getattr(layer, "num_channels", None) or getattr(layer, "num_features", None)
    if not isinstance(num_channels, int):
        raise ConfigError(
            f"Layer {path or 'the model itself'!r} ({type(layer).__name__}) has neither num_channels nor num_features, "
            "so what replaces it cannot be sized. Replace that layer by hand."
        )
    dims = next((dims for kind, dims in _SPATIAL_DIMS if isinstance(layer, kind)), positions)
    if isinstance(layer, nn.BatchNorm1d):
        dims = min(dims, 1)
    return num_channels, dims, False


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Copy the tensors of the old layer where the new one is of the same method and shape."""
    if spec_of(old) is not spec_of(new) or spec_of(new) is None:
        return
    own = new.state_dict()
    fitting = {key: value for key, value in old.state_dict().items() if key in own and value.shape == own[key].shape}
    new.load_state_dict(fitting, strict=False)


def _require_plain(conv: nn.Conv2d, path: str) -> None:
    """Refuse a convolution whose forward pass is not nn.Conv2d's: rebuilding it would lose what it does."""
    if isinstance(conv, SWSConv2d | WSConv2d):
        return
    kind = type(conv)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        raise ConfigError(
            f"Convolution {path or 'the model itself'!r} is a {kind.__name__}, whose own forward pass a standardized "
            "convolution would lose. Build the model with plain nn.Conv2d layers, or convert it to a norm that leaves "
            "convolutions alone, such as group_norm."
        )
