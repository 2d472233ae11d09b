"""``convert``: any torchvision, timm or own model with its normalization replaced.

Layers are found by what they are (:mod:`fednorm.recognition.layers`), never by name. The given model is left as it is;
the result is a copy of it in which

* every normalization layer is what the method puts there (an identity for ``none`` and ``sws``); one that is the
  method's already stays, with its own options where none are given;
* every ``nn.Conv2d`` is the method's convolution, where the method has one, with the old weight and geometry;
* every activation *module* carries the method's constant, where the method has one;
* what the method does to a network built with it is done (:meth:`~fednorm.spec.Norm.prepare`: ``nap`` removes biases).

A network without normalization layers is refused, but for a method that wants a layer before every nonlinearity
(``nap``): there, each activation module that follows a hidden linear layer or convolution gets one before it.

The function is kept up to the normalization itself, and so is what surrounds it
(:mod:`fednorm.conversion.surroundings`): weights and biases of convolutions and linear layers, activations and dropout
inside the old layers, ``requires_grad``, shared tensors and modules, hooks, devices, types, training mode. What cannot
be kept is refused with the module's path. Not kept are scale, shift and running statistics of the old normalization
layers, unless old and new are the same method; they were learned for a function that is no longer there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fednorm.computed import reparameterized, still
from fednorm.conversion.beside import Beside
from fednorm.conversion.channels_last import ChannelsLast
from fednorm.conversion.exact import rewrite
from fednorm.conversion.insertion import hidden_weights, insert, is_activation
from fednorm.conversion.layout import Example, Site, require_layout, run_example, sites
from fednorm.conversion.report import (
    COMPUTED,
    DECLARE,
    DECLARED_NONE,
    NO_CONSTANT,
    NOT_2D,
    UNKNOWN,
    ConversionReport,
    Left,
)
from fednorm.conversion.same_method import SameMethod, normalizes_positions
from fednorm.conversion.surroundings import (
    Surroundings,
    copy_of,
    named,
    own_tensors,
    require_convertible,
)
from fednorm.errors import ConfigError
from fednorm.norms import make_norm, specs_by_layer
from fednorm.norms.sws import ScaledActivation, SWSConv2d
from fednorm.norms.weight_compander import CompandedConv2d, WeightCompander, uncompand
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.recognition.layers import anchor_of, declaration_of, own_forward, own_vectors, recognize
from fednorm.recognition.tensor_kinds import declared_tensors
from fednorm.rng import torch_seeded
from fednorm.spec import Norm

__all__ = ["ChannelsLast", "ConversionReport", "Left", "convert", "convert_with_report"]

_ACTIVATION_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.Tanh: "tanh",
    nn.LeakyReLU: "leaky_relu",
    nn.SELU: "selu",
}
_CONSTANTLESS = (nn.Hardswish, nn.Mish, nn.PReLU, nn.CELU, nn.Softplus)
_OTHER_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def convert(
    model: nn.Module, norm: str | Norm, *, example_inputs: Example | None = None, exact: bool = False, **options: Any
) -> nn.Module:
    """Return a copy of a model with its normalization replaced by another method.

    Args:
        model: The model; it is not changed.
        norm: Name of the method, or a configured :class:`~fednorm.spec.Norm`.
        example_inputs: An input (a tensor, a list of arguments or a dictionary of keyword arguments), for models
            whose layers do not show which inputs they get: it is run through the model, and through the result.
        exact: Keep the function of a pre-norm transformer, which ``rms_norm`` and ``crms_norm`` can do: outputs and
            gradients stay (:mod:`fednorm.conversion.exact`).
        **options: The method's options, where ``norm`` is a name. A layer that is of the method already keeps its own
            for those that are not given (of a configured norm: those that are at their defaults).

    Returns:
        The converted copy.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: An option is wrong, a layer cannot be converted or what surrounds it cannot be kept, or nothing
            would change.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fednorm.convert(model, "group_norm", num_groups=4)[1].num_groups
        4
    """
    return convert_with_report(model, norm, example_inputs=example_inputs, exact=exact, **options)[0]


def convert_with_report(
    model: nn.Module, norm: str | Norm, *, example_inputs: Example | None = None, exact: bool = False, **options: Any
) -> tuple[nn.Module, ConversionReport]:
    """Do what :func:`convert` does, and say what was done.

    Returns:
        The converted copy and the report.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: An option is wrong, a layer cannot be converted or what surrounds it cannot be kept, or nothing
            would change.
    """
    if isinstance(norm, str):
        norm = make_norm(norm, options)
        given = set(options)
    elif options:
        raise ConfigError(f"Options ({', '.join(options)}) go with a method's name; {norm!r} has its own already.")
    else:
        given = {f.name for f in dataclasses.fields(norm) if getattr(norm, f.name) != f.default}
    require_convertible(model)
    if exact:
        return rewrite(model, norm, example_inputs)
    before = copy_of(model) if isinstance(norm, WeightCompander) and not given else uncompand(copy_of(model))
    # Building layers draws initial weights; the caller's generator must not notice.
    with still(before), torch_seeded(0, "convert"):
        conversion = _Conversion(norm, given, before, sites(before, example_inputs))
        converted = conversion.complete(conversion.convert(before))
    conversion.finish(model)
    if example_inputs is not None:
        run_example(converted, example_inputs, f"The model, converted to {type(norm).__name__},")
    return converted, conversion.report


class _Conversion:
    """One walk over one model, in module order."""

    def __init__(self, norm: Norm, given: set[str], model: nn.Module, known: dict[int, Site]) -> None:
        layers = norm.normalizer
        self.norm = norm
        self.report = ConversionReport(norm)
        self.rebuilds_convolutions = type(layers).conv_layer is not Norm.conv_layer or not layers.shifts
        self.normalizes = type(layers).layer is not Norm.layer
        self.same = SameMethod(layers, given if layers is norm else ())
        self.beside = Beside(norm, model, self.report)
        self.sites = known
        self.around = Surroundings(model)
        self.done: dict[int, nn.Module] = {}
        self.kept: list[nn.Module] = []
        self.gains: dict[int, nn.Parameter] = {}

    def convert(self, module: nn.Module, path: str = "", ancestors: tuple[nn.Module, ...] = ()) -> nn.Module:
        """Return what stands for a module; its descendants are converted in place."""
        if id(module) in self.done:
            return self.done[id(module)]
        if not self.normalizes and vars(module).get("inplace") is True:
            # Behind an identity it would overwrite what the layer before it left for others, e.g. a shortcut.
            vars(module)["inplace"] = False
        replace = self._replacement(module)
        if replace is None and (brought := self.beside.replacement(module, path)) is not None:
            self.around.replace(module, brought, path)
            new = brought
        elif replace is None:
            self._look_at(module, path)
            new = self._inside(module, path, ancestors)
        else:
            new = replace(module, path, ancestors)
        self.kept.append(module)  # an id is only unique while its object lives
        self.done[id(module)] = new
        return new

    def _inside(self, module: nn.Module, path: str, ancestors: tuple[nn.Module, ...]) -> nn.Module:
        """Convert a module's children in place, and return the module."""
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self.convert(child, _join(path, name), (*ancestors, module))
        return module

    def complete(self, model: nn.Module) -> nn.Module:
        """Insert layers into a converted network that had none, where the method wants that; then prepare it."""
        self.around.finish(model)
        if self.norm.inserts and not self.report.layers:
            self.report.inserted = insert(model, self.norm, ChannelsLast)
        elif self.norm.inserts:
            bare = [place.after.path for place in hidden_weights(model) if place.after and is_activation(place.after)]
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

    def finish(self, before: nn.Module) -> None:
        """Refuse a conversion that did nothing, and write the notes."""
        report, unknown = self.report, self.report.unknown()
        replaced = report.layers or report.inserted or self.beside.replaced
        if not replaced and (self.normalizes or not report.convolutions):
            raise ConfigError(
                f"{type(before).__name__} has no normalization layer that {type(self.norm).__name__} could replace, so "
                "converting it would change nothing. "
                + (
                    unknown
                    or "Give a model with one of nn.BatchNorm*, nn.GroupNorm, nn.LayerNorm or nn.InstanceNorm* "
                    "(functional calls cannot be seen), or build it with the norm in the first place."
                )
            )
        report.write_notes(scales=self._scales_activations())

    def _replacement(self, module: nn.Module) -> _Replace | None:
        if id(module) in self.sites:
            return self._layer
        if isinstance(module, nn.Conv2d) and (self.rebuilds_convolutions or isinstance(module, SWSConv2d | WSConv2d)):
            return self._conv
        if isinstance(module, ScaledActivation):
            return self._unwrapped
        if not self.norm.brings_activation and (type(module) in _ACTIVATION_NAMES or isinstance(module, _CONSTANTLESS)):
            return self._activation
        return None

    def _look_at(self, module: nn.Module, path: str) -> None:
        """Report a module that is left although it may be a normalization layer, or is a convolution.

        Raises:
            ConfigError: It descends from a normalization layer, and computes something else.
        """
        declaration = declaration_of(module)
        kind = type(module)
        if declaration is not None:
            self._leave(module, path, DECLARED_NONE)
            return
        table = specs_by_layer()
        anchor = anchor_of(kind, table)
        if anchor is not None and anchor is not kind and recognize(module, table) is None:
            raise ConfigError(
                f"Layer {named(path, module)} descends from {anchor.__name__}, but its forward pass is its own and "
                f"computes something else, so what takes its place is unknown. {DECLARE.format(kind=kind.__name__)}"
            )
        if ".parametrizations." in f".{path}.":
            return
        if reparameterized(module):
            self._leave(module, path, COMPUTED)
        if self.rebuilds_convolutions and isinstance(module, _OTHER_CONVOLUTIONS):
            self._leave(module, path, NOT_2D)
        elif _may_normalize(module):
            self._leave(module, path, UNKNOWN)

    def _leave(self, module: nn.Module, path: str, reason: str) -> None:
        self.report.left.append(Left(path, type(module).__name__, reason))

    def _layer(self, old: nn.Module, path: str, ancestors: tuple[nn.Module, ...]) -> nn.Module:
        """Return what replaces a normalization layer, together with what the old one had fused into it."""
        site = self.sites[id(old)]
        known = site.recognition
        self.report.layers.append(path)
        if self.same.applies(old, known) and self.same.settle(old, known):
            return self._inside(old, path, ancestors)
        self._require_accounted(old, path, site)
        core, last = self._core(old, path, site)
        new: nn.Module = core
        if last and not isinstance(core, nn.Identity):
            if site.batch_axis is None:
                self._require_no_batch_axis(old, path, site)
            new = ChannelsLast(core, site.batch_axis or 0)
        after = [child for child in old._modules.values() if child is not None] if known.fused else []
        names = [name for name, child in old._modules.items() if child is not None] if known.fused else []
        if known.activation is not None:
            after.append(known.activation(old).train(old.training))
            names.append("activation")
        inner = (*ancestors, old)
        fused = [
            self.convert(child, _join(path, name), inner)
            for name, child in zip(names, after, strict=True)
            if not isinstance(child, nn.Identity) and id(child) not in self.sites
        ]
        outer = nn.Sequential(new, *fused) if fused else new
        self.around.adopt(old, core, outer, path, ancestors)
        return outer

    def _core(self, old: nn.Module, path: str, site: Site) -> tuple[nn.Module, bool]:
        """Build the new layer; return it and whether the channels of its input are last."""
        if not self.normalizes:
            return self.norm.layer(site.recognition.channels or 1, 1), False
        channels, last = require_layout(site, old, path)
        dims = sorted({min(d, 1) for d in site.dims}) if last else site.dims
        like = self.around.like(old, ())
        # What normalizes each position by itself is replaced by what does so too, unless the caller says otherwise.
        each = (last or normalizes_positions(old)) and "over" not in self.same.given
        try:
            with torch.device(torch.device("cpu") if like is None else like.device):
                if self.same.applies(old, site.recognition):
                    return self.same.build(old, site.recognition, channels, dims), last
                return (self.norm.on_tokens if each else self.norm).layer_for(channels, dims), last
        except ConfigError as error:
            hint = ""
            if len(dims) > 1 and 0 in dims:
                hint = " If it never gets features (N, C), show that: convert(..., example_inputs=images)."
            raise ConfigError(f"Layer {named(path, old)}: {error}{hint}") from error

    def _require_accounted(self, old: nn.Module, path: str, site: Site) -> None:
        """Refuse a layer that owns more than its method speaks for.

        Raises:
            ConfigError: It has other tensors, or children that its forward pass may use.
        """
        known = site.recognition
        spoken = set(own_tensors(old)) if known.spec is None or known.declared else set(known.spec.tensors)
        spoken |= set(declared_tensors(type(old)))
        more = [*(set(own_tensors(old)) - spoken), *([] if known.fused else [n for n, _ in old.named_children()])]
        if is_parametrized(old):
            more = []  # refused with its own words
        if more:
            raise ConfigError(
                f"Layer {named(path, old)} has more than a normalization layer of its type: {', '.join(sorted(more))}, "
                "which would be lost. Move it out of the layer, or say what the class is: fednorm.declare("
                f"{type(old).__name__}, like=..., tensors={{...}})."
            )

    def _require_no_batch_axis(self, old: nn.Module, path: str, site: Site) -> None:
        """Require a method for which it does not matter which axis is the batch.

        Raises:
            ConfigError: It does matter.
        """
        channels, _ = require_layout(site, old, path)
        x = torch.randn(3, channels, 4, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        with torch.device("cpu"), torch.no_grad():
            layers = [self.norm.layer_for(channels, (0, 1)) for _ in range(2)]
            try:
                one, other = layers[0](x), layers[1](x.transpose(0, 2)).transpose(0, 2)
            except Exception:  # it may want to be told about tasks first
                one, other = x, -x
        if not torch.allclose(one, other, atol=1e-4):
            raise ConfigError(
                f"Layer {named(path, old)} stands beside a module with batch_first=False, so whether its input is "
                f"(N, L, C) or (L, N, C) cannot be seen, and to {type(self.norm).__name__} it matters. Show it: "
                "convert(..., example_inputs=batch); or build the model with batch_first=True."
            )

    def _conv(self, old: nn.Module, path: str, ancestors: tuple[nn.Module, ...]) -> nn.Module:
        """Build the method's convolution with the old one's weight and geometry."""
        assert isinstance(old, nn.Conv2d)
        norm = self.same.conv_norm(old)
        self.report.convolutions.append(path)
        if norm is None:
            return old
        try:
            with torch.device(old.weight.device):
                new = norm.conv(
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
        if type(new) in (nn.Conv2d, CompandedConv2d) and not isinstance(old, SWSConv2d | WSConv2d):
            self._look_at(old, path)
            if old.bias is None and new.bias is not None:
                old.bias = _zero_bias(old)
            return self._inside(old, path, ancestors)
        _require_plain(old, path)
        if old.bias is None and new.bias is not None:
            # A bias the old layer did not have starts at 0, so that the function changes by the norm alone.
            old.bias = _zero_bias(old)
        # The parameters themselves, so that whatever shares them goes on sharing them.
        new.weight, new.bias = old.weight, old.bias
        self._gain(old, new)
        for name, value in vars(old).items():
            if name not in vars(new):
                vars(new)[name] = value
        new.training = old.training
        self.around.replace(old, new, path)
        return new

    def _gain(self, old: nn.Conv2d, new: nn.Conv2d) -> None:
        """Give a convolution's new gain its type, its old value and its ties: those of its weight."""
        if not isinstance(new, SWSConv2d) or new.gain is None:
            return
        gain = new.gain.to(old.weight.dtype).detach()
        if isinstance(old, SWSConv2d) and old.gain is not None:
            gain = old.gain.detach()
        made = nn.Parameter(gain, old.weight.requires_grad)
        new.gain = self.gains.setdefault(id(old.weight), made)

    def _unwrapped(self, old: nn.Module, path: str, ancestors: tuple[nn.Module, ...]) -> nn.Module:
        """Take an earlier conversion's constant off, then treat what is left as any other activation."""
        assert isinstance(old, ScaledActivation)
        new = self.convert(old.activation, path, ancestors)
        self.around.replace(old, new, path)
        return new

    def _activation(self, old: nn.Module, path: str, ancestors: tuple[nn.Module, ...]) -> nn.Module:
        """Multiply an activation by the method's constant, and keep its settings."""
        del ancestors
        if not self._scales_activations():
            return old
        name = _ACTIVATION_NAMES.get(type(old))
        scaled = None if name is None else self.norm.activation(name)
        if not isinstance(scaled, ScaledActivation):
            if name is None:
                self._leave(old, path, NO_CONSTANT)
            return old
        self.report.activations.append(path)
        new = ScaledActivation(old, scaled.gamma)
        new.training = old.training
        return new

    def _scales_activations(self) -> bool:
        return isinstance(self.norm.activation("relu"), ScaledActivation)


_Replace = Callable[[nn.Module, str, tuple[nn.Module, ...]], nn.Module]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _may_normalize(module: nn.Module) -> bool:
    """Return whether a module that is not recognised is called a norm and built like one: it holds vectors at most."""
    if isinstance(module, nn.LocalResponseNorm | nn.CrossMapLRN2d):
        return True
    vectors = dict(own_vectors(module))
    plain = all(name in vectors or not tensor.ndim for name, tensor in own_tensors(module).items())
    inside = [tensor for child in module.children() for tensor in own_tensors(child).values()]
    return "norm" in type(module).__name__.lower() and plain and not inside and not _holds_modules(module)


def _holds_modules(module: nn.Module) -> bool:
    """Return whether a module only holds others, e.g. a block called ConvNormAct."""
    return not own_tensors(module) and any(True for _ in module.children())


def _zero_bias(conv: nn.Conv2d) -> nn.Parameter:
    trains = any(parameter.requires_grad for parameter in conv.parameters())
    return nn.Parameter(conv.weight.detach().new_zeros(conv.out_channels), trains)


def _require_plain(conv: nn.Conv2d, path: str) -> None:
    """Refuse a convolution of which a standardized one would lose something.

    Raises:
        ConfigError: Its forward pass is not nn.Conv2d's, or its weight is computed from others.
    """
    if not isinstance(conv, SWSConv2d | WSConv2d) and own_forward(conv, nn.Conv2d):
        raise ConfigError(
            f"Convolution {path or 'the model itself'!r} is a {type(conv).__name__}, whose own forward pass a "
            "standardized convolution would lose. Build the model with plain nn.Conv2d layers, or convert it to a norm "
            "that leaves convolutions alone, such as group_norm."
        )
    computed = reparameterized(conv)
    if computed:
        raise ConfigError(
            f"Convolution {path or 'the model itself'!r} has a parametrization, pruning or weight normalization of its "
            f"own on {computed}, which a standardized weight would undo or lose. Take it off before converting "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove, "
            "torch.nn.utils.remove_spectral_norm), or convert to a norm that leaves convolutions alone, such as "
            "group_norm."
        )
