"""Recognition: is a module a normalization layer, of which method, over which axis, and what else does it do?

A module is recognised, in this order,

1. by the user's declaration (:func:`fednorm.declare`), the last word;
2. by type: a layer of PyTorch's or of this package, or a descendant that computes what its ancestor does;
3. by what it computes: a descendant whose forward pass is its own, or a foreign class, is run on random numbers and
   compared with the formula of each method over each axis, in both modes (:mod:`fednorm.recognition.probing`). This
   knows timm's, torchvision's and Hugging Face's layers, with the activation that some have inside, and imports none of
   them.

A name decides nothing: neither of a class nor of an attribute. What is left is None, though its class be called Norm.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fednorm.recognition.probing import Match, probe
from fednorm.roles import Kind
from fednorm.spec import NormSpec, TensorSpec

Table = Mapping[type[nn.Module], NormSpec]
"""Layer types with the identity card of the method that speaks for each."""

MakeActivation = Callable[[nn.Module], nn.Module]

ALL_DIMS = (0, 1, 2, 3)
_USUAL = {"gamma": Kind.SCALE, "scale": Kind.SCALE, "beta": Kind.SHIFT, "shift": Kind.SHIFT}
_OURS = ("torch.nn.modules.", "fednorm.")
_ONLY_CHECKS = frozenset({"_check_input_dim"})
_ALWAYS_USED = frozenset({"__call__", "_call_impl", "__getattr__", "__getattribute__"})
_DIMS: tuple[tuple[type[nn.Module], tuple[int, ...]], ...] = (
    (nn.BatchNorm1d, (0, 1)),
    (nn.BatchNorm2d, (2,)),
    (nn.BatchNorm3d, (3,)),
    (nn.InstanceNorm1d, (1,)),
    (nn.InstanceNorm2d, (2,)),
    (nn.InstanceNorm3d, (3,)),
)


@dataclass(frozen=True)
class Recognition:
    """What is known of a normalization layer.

    Attributes:
        spec: The card of its method; None for a layer with constants in place of statistics (FrozenBatchNorm2d), of
            which no tensor is trained or estimated.
        channels: C; None where the layer does not say.
        channels_last: Whether its channels are the last axis; None where that cannot be told.
        dims: The numbers of axes beside N and C that its input may have.
        fused: Whether its children (dropout, activation) are applied after it, in their order.
        activation: Makes the activation that its forward pass applies without a child for it; None where none is.
        offset: What its forward pass adds to its scale: 1 where a scale of 0 is the identity, as in Gemma's.
        declared: Whether the user said all this.
    """

    spec: NormSpec | None
    channels: int | None
    channels_last: bool | None
    dims: tuple[int, ...]
    fused: bool = False
    activation: MakeActivation | None = None
    offset: float = 0.0
    declared: bool = False


@dataclass(frozen=True)
class Declaration:
    """What a user says of a class; see :func:`fednorm.declare`.

    Attributes:
        like: The known class that it is like; None says that it is no normalization layer.
        channels_first: Whether its channels are axis 1; None where ``like`` says it.
        activation: Makes the activation that its forward pass applies beside its children; None where none is.
        tensors: What its tensors are, where ``like`` has others.
    """

    like: type[nn.Module] | None
    channels_first: bool | None
    activation: MakeActivation | None
    tensors: Mapping[str, TensorSpec] | None


DECLARED: dict[type[nn.Module], Declaration] = {}
"""Every class that was declared in this process."""


def declaration_of(module: nn.Module) -> Declaration | None:
    """Return what the user said of a module's class, or of the ancestor whose forward pass it has; else None."""
    kind = type_before_parametrizations(module)
    for base in kind.__mro__:
        if base in DECLARED:
            return None if base is not kind and own_forward(module, base) else DECLARED[base]
    return None


def recognize(module: nn.Module, table: Table) -> Recognition | None:
    """Return what is known of a normalization layer, or of a layer that some method speaks for; None for any other.

    Args:
        module: The module; it is not changed, and no generator is touched.
        table: The layer types that methods speak for.
    """
    declaration = declaration_of(module)
    if declaration is not None:
        return None if declaration.like is None else _as_declared(module, declaration, declaration.like, table)
    anchor = anchor_of(type_before_parametrizations(module), table)
    if anchor is not None and not own_forward(module, anchor):
        return _by_type(module, anchor, table)
    match = probe(module, anchor)
    return None if match is None else _from_match(match, table)


def anchor_of(kind: type[nn.Module], table: Table) -> type[nn.Module] | None:
    """Return a class's nearest ancestor, or the class itself, that is a method's layer of PyTorch's or of ours."""
    for base in kind.__mro__:
        if base in table or (base.__module__.startswith(_OURS) and any(b in table for b in base.__mro__)):
            return base
    return None


def spec_in(kind: type[nn.Module], table: Table) -> NormSpec:
    """Return the card of the method that speaks for the nearest ancestor of a class that has one."""
    return next(table[base] for base in kind.__mro__ if base in table)


def own_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Return whether a module computes something of its own: overrides what the forward pass of ``base`` uses."""
    if "forward" in vars(module):
        return True
    used = _used(base)  # type: ignore[arg-type]  # classes can be hashed; nn.Module's __hash__ confuses mypy
    for kind in type_before_parametrizations(module).__mro__:
        if kind is base:
            return False
        if any(name in used and (callable(value) or hasattr(value, "__get__")) for name, value in vars(kind).items()):
            return True
    return True


@cache
def _used(base: type[nn.Module]) -> frozenset[str]:
    """Return every name that a class's forward pass, or a method it calls, refers to; checks of the input left out."""
    names = set(_ALWAYS_USED)
    pending = ["forward"]
    while pending:
        name = pending.pop()
        names.add(name)
        function = inspect.getattr_static(base, name, None)
        if isinstance(function, FunctionType):
            pending.extend(set(function.__code__.co_names) - names)
            names.update(function.__code__.co_names)
    return frozenset(names - _ONLY_CHECKS)


def channels_of(module: nn.Module) -> int | None:
    """Return C as a layer says it: by an attribute of PyTorch's layers, or by the length of its own vectors."""
    for name in ("num_features", "num_channels", "normalized_shape"):
        value: Any = getattr(module, name, None)
        if isinstance(value, tuple | list) and len(value) == 1:
            value = value[0]
        if isinstance(value, int):
            return value
    lengths = {max(tensor.shape) for _, tensor in own_vectors(module)}
    return lengths.pop() if len(lengths) == 1 else None


def eps_name(layer: nn.Module) -> str | None:
    """Return the name of the attribute in which a layer keeps its eps, e.g. ``variance_epsilon``; None without one."""
    numbers = (name for name, value in vars(layer).items() if value is None or isinstance(value, float))
    return next((name for name in numbers if "eps" in name.lower()), None)


def own_vectors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own tensors that have at most one axis longer than 1, without scalars."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.ndim and max(tensor.shape, default=0) == tensor.numel():
            yield name, tensor


def _by_type(module: nn.Module, anchor: type[nn.Module], table: Table) -> Recognition:
    shape: Any = getattr(module, "normalized_shape", (0,))
    kind = type_before_parametrizations(module)
    checks = all(getattr(kind, name, None) is getattr(anchor, name, None) for name in _ONLY_CHECKS)
    return Recognition(
        spec=spec_in(anchor, table),
        channels=channels_of(module),
        # A shape of several axes does not say which of them is the channels.
        channels_last=channels_last_of(anchor) if len(shape) == 1 else None,
        dims=_dims_of(anchor) if checks else ALL_DIMS,
    )


def channels_last_of(kind: type[nn.Module]) -> bool | None:
    """Return whether a layer of PyTorch's or of ours has its channels on the last axis; None where none can replace it.

    A layer of ours says it by an attribute of that name, where they are not on the first.
    """
    if kind.__module__.startswith("fednorm."):
        return getattr(kind, "channels_last", False)
    return issubclass(kind, nn.LayerNorm | nn.RMSNorm) and kind.__module__.startswith("torch.")


def _dims_of(kind: type[nn.Module]) -> tuple[int, ...]:
    return next((dims for base, dims in _DIMS if issubclass(kind, base)), ALL_DIMS)


def _as_declared(module: nn.Module, said: Declaration, like: type[nn.Module], table: Table) -> Recognition:
    anchor = anchor_of(like, table)
    assert anchor is not None, "fednorm.declare has checked it"
    spec = spec_in(anchor, table)
    first = said.channels_first
    return Recognition(
        spec=dataclasses.replace(spec, tensors=said.tensors or _tensors_of(module, spec)),
        channels=channels_of(module),
        channels_last=channels_last_of(anchor) if first is None else not first,
        dims=_dims_of(anchor),
        fused=any(True for _ in module.children()),
        activation=said.activation,
        declared=True,
    )


def _tensors_of(module: nn.Module, spec: NormSpec) -> Mapping[str, TensorSpec]:
    """Return what the tensors of a declared class are where that was not said: those of its like, or a usual name's."""
    known = dict(spec.tensors)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        kind = _USUAL.get(name) if tensor.ndim else Kind.COUNT
        if name not in known and kind is not None:
            known[name] = TensorSpec(kind)
    return known


def _from_match(match: Match, table: Table) -> Recognition:
    spec = None if match.like is None else spec_in(match.like, table)
    if spec is not None and set(match.tensors) - set(spec.tensors):
        spec = dataclasses.replace(spec, tensors={name: TensorSpec(kind) for name, kind in match.tensors.items()})
    return Recognition(
        spec=spec,
        channels=match.channels,
        channels_last=match.channels_last,
        dims=match.dims,
        fused=match.fused,
        activation=match.activation,
        offset=match.offset,
    )
