"""Probing: what a layer computes, found by running a copy of it on random numbers beside each method's formula.

A class's name and its ancestor say what a layer was made from; its output says what it does. A copy with random scale,
shift and statistics (so that axes and tensors cannot be confused) runs on inputs of every layout, in evaluation and in
training, and its output is compared with

    f(norm(x)),   norm one of batch, frozen batch, group, instance, layer and RMS normalization,
                  over the channels on axis 1 or on the last axis,
                  f the layer's children (dropout off), then one of PyTorch's activations or none.

Results are kept by structure: a network's hundred layers of one class and width are probed once. Nothing here touches
the module, a generator, or the device it is on; a layer on the meta device can be probed as any other.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from fednorm.rng import torch_seeded
from fednorm.roles import Kind

_TOLERANCE = 1e-4
_SIZES = (3, 5, 7, 11, 13)
_EPS = 1e-5
_ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Hardswish, nn.Mish, nn.Softplus,
    nn.Hardsigmoid, partial(nn.GELU, approximate="tanh"),
)  # fmt: skip


@dataclass(frozen=True)
class Match:
    """What a layer was found to compute.

    Attributes:
        like: PyTorch's class of that method; None for batch normalization by constants.
        channels: C.
        channels_last: Whether the channels are the last axis; None where several layouts fit.
        dims: The numbers of axes beside N and C that it takes.
        tensors: What each of its tensors is.
        fused: Whether its children are applied after the normalization.
        activation: Makes what its forward pass applies after all that; None for nothing.
        offset: What it adds to its scale.
    """

    like: type[nn.Module] | None
    channels: int
    channels_last: bool | None
    dims: tuple[int, ...]
    tensors: Mapping[str, Kind]
    fused: bool
    activation: Callable[[nn.Module], nn.Module] | None
    offset: float = 0.0


@dataclass(frozen=True)
class _Reading:
    """One way to read a layer: a method, and which of its tensors is what."""

    like: type[nn.Module] | None
    scale: str = ""
    shift: str = ""
    mean: str = ""
    var: str = ""
    offset: float = 0.0  # of the scale: 1 where a weight of 0 is the identity

    def kinds(self, module: nn.Module) -> dict[str, Kind]:
        named = {self.scale: Kind.SCALE, self.shift: Kind.SHIFT, self.mean: Kind.MEAN, self.var: Kind.VAR}
        kinds = {name: kind for name, kind in named.items() if name}
        return kinds | {name: Kind.COUNT for name, tensor in module.named_buffers(recurse=False) if not tensor.ndim}


@dataclass(frozen=True)
class _Layout:
    """Where the channels of an input are, and how many other axes than N and C it has."""

    last: bool
    dims: int

    def example(self, channels: int) -> Tensor:
        sizes = [size for size in _SIZES if size != channels][: self.dims]
        shape = (4, *sizes, channels) if self.last else (4, channels, *sizes)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.4


_FIRST = tuple(_Layout(False, dims) for dims in (2, 1, 3, 0))
_LAST = tuple(_Layout(True, dims) for dims in (2, 1, 3))

_EVERY_MODULES = frozenset(vars(nn.Module()))
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_SETTINGS = (str, int, float, bool, type(None), tuple, torch.Size, torch.dtype, torch.device, *_FUNCTIONS)

_cache: weakref.WeakKeyDictionary[type[nn.Module], dict[Hashable, Match | None]] = weakref.WeakKeyDictionary()


def probe(module: nn.Module, anchor: type[nn.Module] | None) -> Match | None:
    """Return what a layer computes; None where it is none of the formulas, or no layer of that build.

    Args:
        module: The layer.
        anchor: The class of PyTorch's or ours that it descends from; None for any other class.
    """
    if is_parametrized(module) or not _is_candidate(module, anchor):
        return None
    key = _structure(module)
    if key is None:
        return _probe(module, anchor)
    known = _cache.setdefault(type(module), {})
    if key not in known:
        known[key] = _probe(module, anchor)
    return known[key]


def _is_candidate(module: nn.Module, anchor: type[nn.Module] | None) -> bool:
    """Return whether a module is built as a normalization layer is; others are never run."""
    if anchor is not None:
        return issubclass(anchor, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    if type(module).__module__.startswith("torch.nn."):
        return False
    own = _own(module)
    if any(tensor.numel() != max(tensor.shape, default=1) for tensor in own.values()) or len(own) > 5:
        return False
    hint = "norm" in type(module).__name__.lower() or _eps_of(module) is not None
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    return hint and len({tensor.numel() for tensor in own.values() if tensor.ndim}) <= 1 and not children


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _structure(module: nn.Module) -> Hashable | None:
    """Return what a layer's function depends on, but for the values of its tensors; None where that cannot be told."""
    parts: list[Hashable] = []
    for name, part in module.named_modules():
        settings = {key: value for key, value in vars(part).items() if key not in _EVERY_MODULES}
        if not all(isinstance(value, _SETTINGS) for value in settings.values()):
            return None
        functions = tuple(value for value in settings.values() if isinstance(value, _FUNCTIONS))
        parts.append((name, type(part), functions, tuple((key, repr(value)) for key, value in settings.items())))
    tensors = tuple((key, tuple(t.shape), isinstance(t, nn.Parameter)) for key, t in _own(module).items())
    return (tensors, tuple(parts))


def _eps_of(module: nn.Module) -> float | None:
    values = [value for name, value in vars(module).items() if "eps" in name.lower()]
    values.append(getattr(module, "eps", None))
    return next((float(value) for value in values if isinstance(value, float | int)), None)


def _probe(module: nn.Module, anchor: type[nn.Module] | None) -> Match | None:
    with torch.device("cpu"), torch.no_grad(), torch_seeded(0, "probe"):
        try:
            layer = _filled(module)
        except Exception:  # a foreign class may refuse to be copied in any way it likes
            return None
        channels = _channels(layer)
        if channels is None:
            return None
        for reading in _readings(layer, anchor):
            match = _match(layer, reading, channels, anchor)
            if match is not None:
                return match
    return None


def _filled(module: nn.Module) -> nn.Module:
    """Return a copy on the CPU in float32, with random tensors of its own."""
    memo: dict[int, Any] = {id(t): t.detach() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf}
    layer = copy.deepcopy(module, memo)
    generator = torch.Generator().manual_seed(2)
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        layer = layer.to_empty(device="cpu")
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(0.25)
    layer = layer.to("cpu").float()
    for tensor in _own(layer).values():
        if tensor.ndim:
            # In (0.5, 1.5) it may be a scale or a variance as well as a shift, and no two are alike.
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def _channels(layer: nn.Module) -> int | None:
    lengths = {tensor.numel() for tensor in _own(layer).values() if tensor.ndim}
    if lengths:
        return lengths.pop() if len(lengths) == 1 else None
    for name in ("num_features", "num_channels", "normalized_shape", "dim", "channels", "hidden_size"):
        value: Any = getattr(layer, name, None)
        value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
        if isinstance(value, int):
            return value
    return None


def _readings(layer: nn.Module, anchor: type[nn.Module] | None) -> Iterator[_Reading]:
    """Yield every way to read a layer, likely ones first."""
    if anchor is not None:
        own = {name for name, tensor in _own(layer).items() if tensor.ndim}
        family = next(f for f in (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
                      if issubclass(anchor, f))  # fmt: skip
        concrete: dict[type[nn.Module], type[nn.Module]] = {
            _BatchNorm: nn.BatchNorm2d,
            _InstanceNorm: nn.InstanceNorm2d,
        }
        names = {"scale": "weight", "shift": "bias", "mean": "running_mean", "var": "running_var"}
        fitting = {role: name for role, name in names.items() if name in own}
        if set(fitting.values()) == own:
            yield _Reading(concrete.get(family, family), **fitting)  # type: ignore[arg-type]
        return
    vectors = [name for name, tensor in _own(layer).items() if tensor.ndim]
    mean = next((name for name in vectors if "mean" in name), "")
    var = next((name for name in vectors if "var" in name), "")
    rest = [name for name in vectors if name not in (mean, var)]
    if len(rest) > 2 or bool(mean) != bool(var):
        return
    orders = [(rest[0], rest[1]), (rest[1], rest[0])] if len(rest) == 2 else [(rest[0] if rest else "", "")]
    for scale, shift in orders:
        if mean:
            for like in (None, nn.BatchNorm2d):
                yield _Reading(like, scale, shift, mean, var)
            continue
        yield from (_Reading(kind, scale, shift) for kind in (nn.RMSNorm, nn.LayerNorm))
        if scale:
            yield from (_Reading(kind, scale, shift, offset=1.0) for kind in (nn.RMSNorm, nn.LayerNorm))
        if isinstance(getattr(layer, "num_groups", None), int):
            yield _Reading(nn.GroupNorm, scale, shift)


def _match(layer: nn.Module, reading: _Reading, channels: int, anchor: type[nn.Module] | None) -> Match | None:
    """Return the match of a layer with one reading over all layouts; None without any."""
    either = reading.like in (nn.LayerNorm, nn.RMSNorm)
    fits: list[_Layout] = []
    after: _After | None = None
    for layout in (*_LAST, *_FIRST) if either else _FIRST:
        x = layout.example(channels)
        y = _run(layer, x, training=False)
        if y is None or y.shape != x.shape:
            continue
        wanted = _formula(layer, reading, layout, x, training=False)
        again = partial(_with_other_values, layer, reading, layout, x)
        this = after if after is not None and after.fits(layer, wanted, y) else _After.of(layer, wanted, y, again)
        if this is None or (after is not None and this is not after):
            continue
        synced = anchor is not None and issubclass(anchor, nn.SyncBatchNorm)  # trains on GPUs only
        if not synced:
            y = _run(layer, x, training=True)
            if y is None or not this.fits(layer, _formula(layer, reading, layout, x, training=True), y):
                continue
        after = this
        fits.append(layout)
    if after is None:
        return None
    last = {layout.last for layout in fits if layout.dims}
    return Match(
        like=reading.like,
        channels=channels,
        channels_last=last.pop() if len(last) == 1 else (False if not last else None),
        dims=tuple(sorted({layout.dims for layout in fits} | ({0} if last == {True} or fits[0].last else set()))),
        tensors=reading.kinds(layer),
        fused=after.fused,
        activation=after.activation,
        offset=reading.offset,
    )


def _run(layer: nn.Module, x: Tensor, *, training: bool) -> Tensor | None:
    """Return the output of a fresh copy of the layer, its children evaluating; None where it does not take ``x``."""
    layer = copy.deepcopy(layer).train(training)
    for child in layer.children():
        child.eval()
    try:
        y = layer.forward(x.clone())
    except Exception:  # a foreign forward pass may refuse an input in any way it likes
        return None
    return y.float() if isinstance(y, Tensor) else None


def _with_other_values(layer: nn.Module, reading: _Reading, layout: _Layout, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return norm(x) and the layer's output once more, for tensors eight times as large, the smaller of two the larger.

    A shift that is above its scale may hide what an activation makes of negative values, and small ones what it makes
    of large values: with two channels, layer normalization gives 1 and -1 alone.
    """
    other = copy.deepcopy(layer)
    for tensor in _own(other).values():
        if tensor.ndim:
            tensor.copy_(8 * (2 - tensor))
    return _formula(other, reading, layout, x, training=False), _run(other, x, training=False)


def _formula(layer: nn.Module, reading: _Reading, layout: _Layout, x: Tensor, *, training: bool) -> Tensor:
    """Return norm(x) by a reading of the layer's tensors, without what may come after it."""
    own, like = _own(layer), reading.like
    x = x.movedim(-1, 1) if layout.last else x
    eps = _eps_of(layer)
    eps = _EPS if eps is None else eps
    mean, var = (own[name].flatten() if name else None for name in (reading.mean, reading.var))
    if like is None or like is nn.BatchNorm2d:
        batch = like is not None and (training or mean is None)
        y = F.batch_norm(x, None if batch else mean, None if batch else var, training=batch, eps=eps)
    elif like is nn.InstanceNorm2d:
        y = F.instance_norm(x, None, None, use_input_stats=True, eps=eps) if x.ndim > 2 else x
    elif like is nn.GroupNorm:
        y = F.group_norm(x, int(layer.num_groups), eps=eps)  # type: ignore[arg-type]
    elif like is nn.LayerNorm:
        y = (x - x.mean(1, keepdim=True)) * (x.var(1, unbiased=False, keepdim=True) + eps).rsqrt()
    else:
        y = x * (x.square().mean(1, keepdim=True) + eps).rsqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    if reading.scale:
        y = y * (own[reading.scale].view(shape) + reading.offset)
    if reading.shift:
        y = y + own[reading.shift].view(shape)
    return y.movedim(1, -1) if layout.last else y


@dataclass(frozen=True, eq=False)
class _After:
    """What a layer does after the normalization."""

    fused: bool
    activation: Callable[[nn.Module], nn.Module] | None

    @classmethod
    def of(
        cls, layer: nn.Module, normalized: Tensor, y: Tensor, again: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> _After | None:
        """Return what leads from the normalized input to the layer's output, or None.

        Args:
            layer: The layer.
            normalized: The normalized input.
            y: The layer's output.
            again: Gives both for other values; asked where something fits.
        """
        fitting = partial(cls._fitting, layer)
        if not fitting([(normalized, y)]):
            return None
        other, z = again()
        return fitting([(normalized, y)] if z is None else [(normalized, y), (other, z)])

    @classmethod
    def _fitting(cls, layer: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> _After | None:
        for fused in (True, False) if any(True for _ in layer.children()) else (False,):
            for make in (None, *_ACTIVATIONS, *(_leaky(*pair) for pair in pairs)):
                after = cls(fused, None if make is None else _Make(make))
                if all(after.fits(layer, *pair) for pair in pairs):
                    return after
        return None

    def fits(self, layer: nn.Module, normalized: Tensor, y: Tensor) -> bool:
        """Return whether this leads from the normalized input to the layer's output."""
        try:
            z = normalized.clone()
            for child in layer.children() if self.fused else ():
                z = copy.deepcopy(child).eval()(z)
            z = z if self.activation is None else self.activation(layer)(z)
        except Exception:  # children need not take one tensor
            return False
        return z.shape == y.shape and bool(torch.allclose(z, y, rtol=_TOLERANCE, atol=_TOLERANCE))


@dataclass(frozen=True)
class _Make:
    """Makes an activation without looking at the layer."""

    make: Callable[[], nn.Module]

    def __call__(self, layer: nn.Module) -> nn.Module:
        del layer
        return self.make()


def _leaky(normalized: Tensor, y: Tensor) -> Callable[[], nn.Module]:
    """Return the maker of a leaky ReLU with the slope that the negative values of an output have."""
    below = normalized < -0.1
    slope = float((y[below] / normalized[below]).median()) if below.any() and normalized.shape == y.shape else 0.0
    slope = round(slope, 4)
    return lambda: nn.LeakyReLU(slope)
