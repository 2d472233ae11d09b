"""The norm plan: for every entry of a model's state dict, what it is and what the federation does with it.

Kinds come from the layer's *type* (or its nearest ancestor), never from its name: on a ResNet-18 with torchvision's
names, a test for ``bn`` in the key misses 15 of the 100 BatchNorm entries (``downsample.1``). What counts is, in this
order, what the user declared (:func:`~fednorm.recognition.tensor_kinds.declare_tensors`), the card of the norm that
speaks for the type, and what a look shows: a buffer that two steps of training do not write is a constant
(:mod:`fednorm.recognition.buffers`), a parameter is a weight unless its layer normalizes
(:mod:`fednorm.recognition.structure`). A strategy's :class:`~fednorm.roles.RoleRule` turns kinds into roles; what a
run does not train is a constant, whatever it is. What the plan cannot place, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fednorm.errors import RoleError
from fednorm.federation.places import roles_at
from fednorm.norms import recognition_of, spec_of
from fednorm.recognition.buffers import Observation, observe
from fednorm.recognition.layers import declaration_of
from fednorm.recognition.structure import normalizes, per_channel
from fednorm.recognition.tensor_kinds import declared_tensors
from fednorm.roles import NEVER_NEGATIVE, STATISTICS, Kind, Role, RoleRule


@dataclass(frozen=True)
class Entry:
    """One entry of the state dict.

    Attributes:
        key: Its name in the state dict.
        layer: Path of the module that owns it; empty for the model itself.
        layer_type: Class name of that module.
        norm: Name of the method that speaks for that module; empty where none does.
        kind: What the tensor is.
        role: What the federation does with it.
        shape: Its shape.
        nbytes: Its size in bytes.
        dtype: The type of its values, e.g. ``float32``.
    """

    key: str
    layer: str
    layer_type: str
    norm: str
    kind: Kind
    role: Role
    shape: tuple[int, ...]
    nbytes: int
    dtype: str


@dataclass(frozen=True)
class NormPlan:
    """Every entry of a model's state dict with its role, in the state dict's order."""

    entries: tuple[Entry, ...]

    def keys(self, *roles: Role) -> tuple[str, ...]:
        """Return the keys that have one of the roles, in order."""
        return tuple(entry.key for entry in self.entries if entry.role in roles)

    def count(self, role: Role) -> int:
        """Return the number of entries that have a role."""
        return len(self.keys(role))

    @cached_property
    def sent(self) -> tuple[str, ...]:
        """Return the keys that travel: shared and pooled ones."""
        return self.keys(Role.SHARED, Role.POOLED)

    @cached_property
    def local(self) -> tuple[str, ...]:
        """Return the keys that never leave a client."""
        return self.keys(Role.LOCAL)

    @cached_property
    def counters(self) -> tuple[str, ...]:
        """Return the keys of the counters that travel; each client goes on with its own all the same."""
        return tuple(key for key in self.sent if self.by_key[key].kind is Kind.COUNT)

    @cached_property
    def by_key(self) -> dict[str, Entry]:
        """Return the entries by key."""
        return {entry.key: entry for entry in self.entries}

    @cached_property
    def forms(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and type of every entry, by key."""
        return {entry.key: (entry.shape, getattr(torch, entry.dtype)) for entry in self.entries}

    @cached_property
    def never_negative(self) -> tuple[str, ...]:
        """Return the keys of the entries that have values, and none that is negative."""
        return tuple(entry.key for entry in self.entries if entry.kind in NEVER_NEGATIVE and entry.nbytes)

    @cached_property
    def bytes_sent(self) -> int:
        """Return the bytes of tensors one client receives in a round; it sends back as many."""
        return sum(self.by_key[key].nbytes for key in self.sent)

    @property
    def estimating(self) -> tuple[str, ...]:
        """The paths of the layers that own running statistics, in the order of the state dict."""
        keys = (entry.key for entry in self.entries if entry.kind in STATISTICS)
        return tuple(dict.fromkeys(key.rpartition(".")[0] for key in keys))

    def moments(self) -> Iterator[tuple[str, str]]:
        """Yield the keys (mean, variance) of every layer that has both, in order."""
        yield from self._moments

    @cached_property
    def _moments(self) -> tuple[tuple[str, str], ...]:
        means = {entry.layer: entry.key for entry in self.entries if entry.kind is Kind.MEAN}
        variances = (entry for entry in self.entries if entry.kind is Kind.VAR)
        return tuple((means[entry.layer], entry.key) for entry in variances if entry.layer in means)

    def summary(self, num_clients: int) -> dict[str, int]:
        """Return the numbers of entries by role, and the bytes that a round with ``num_clients`` clients sends.

        Constants are counted where there are any.
        """
        counts = {role.value: self.count(role) for role in self._roles}
        return {**counts, "bytes_per_round": 2 * num_clients * self.bytes_sent}

    def bytes_by_role(self) -> dict[str, int]:
        """Return the bytes of one client's copy of the entries, by role; constants where there are any."""
        return {role.value: sum(entry.nbytes for entry in self.entries if entry.role is role) for role in self._roles}

    @property
    def _roles(self) -> tuple[Role, ...]:
        return tuple(role for role in Role if role is not Role.CONSTANT or self.count(role))

    def tensors(self) -> list[dict[str, Any]]:
        """Return what a record keeps of each entry: key, layer, norm, kind, role, shape, and bytes of one copy."""
        return [
            {
                "key": entry.key,
                "layer": entry.layer,
                "norm": entry.norm,
                "kind": entry.kind.value,
                "role": entry.role.value,
                "shape": list(entry.shape),
                "bytes": entry.nbytes,
            }
            for entry in self.entries
        ]


def norm_plan(model: nn.Module, rule: RoleRule) -> NormPlan:
    """Place every entry of a model's state dict.

    A model with buffers that no card and no declaration speaks for is copied, and the copy trained for two steps.

    Args:
        model: The model.
        rule: The strategy's map from kinds and places to roles.

    Returns:
        The plan; it covers the state dict exactly.

    Raises:
        ConfigError: A pattern of the rule matches nothing.
        RoleError: A layer owns a tensor whose kind nobody knows, or the rule would do nothing on this model.
    """
    _require_shapes(model)
    state = model.state_dict(keep_vars=True)
    entries = {entry.key: entry for entry in _Placing(model, rule).entries() if entry.key in state}
    missing = [key for key in state if key not in entries]
    if missing:
        raise RoleError(
            f"The state dict has entries that no module of the model owns: {', '.join(missing[:5])}. "
            "A custom state_dict() cannot be placed; keep parameters and buffers on their modules."
        )
    plan = NormPlan(tuple(entries[key] for key in state))
    _refuse_no_op(model, plan, rule)
    return plan


def _require_shapes(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
            raise RoleError(
                f"{_where(path, module)} does not know its shape yet. Run one forward pass through a model with lazy "
                "layers before giving it to a strategy."
            )


def _where(path: str, module: nn.Module) -> str:
    return f"module {path or '(the model itself)'!r} ({type(module).__name__})"


class _Placing:
    """One walk over one model; what costs a look at the model is looked at when it is first needed."""

    def __init__(self, model: nn.Module, rule: RoleRule) -> None:
        self.model = model
        self.rule = rule
        self._places = roles_at(model, rule)
        self._normalizing: dict[int, bool | None] = {}

    @cached_property
    def observation(self) -> Observation:
        """What training a copy showed."""
        return observe(self.model)

    def entries(self) -> Iterator[Entry]:
        """Yield the entry of every tensor that a state dict may hold."""
        for path, module in self.model.named_modules(remove_duplicate=False):
            spec = spec_of(module)
            own = [
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            ]
            for name, tensor in own:
                kind = self._kind(path, module, name, tensor)
                if name in module._non_persistent_buffers_set:
                    continue
                key = f"{path}.{name}" if path else name
                yield Entry(
                    key=key,
                    layer=path,
                    layer_type=type(module).__name__,
                    norm=spec.name if spec else "",
                    kind=kind,
                    role=self._role(key, kind),
                    shape=tuple(tensor.shape),
                    nbytes=tensor.numel() * tensor.element_size(),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                )

    def _role(self, key: str, kind: Kind) -> Role:
        if kind is Kind.CONSTANT or key in self.rule.frozen:
            return Role.CONSTANT
        return self._places.get(key, self.rule[kind])

    def _kind(self, path: str, module: nn.Module, name: str, tensor: Tensor) -> Kind:
        declared = declared_tensors(type(module))
        if name in declared:
            return declared[name]
        spec = spec_of(module)
        if spec is not None and name in spec.tensors:
            return spec.tensors[name].kind
        if not isinstance(tensor, nn.Parameter):
            return self._buffer(path, module, name, tensor)
        if spec is not None:
            raise RoleError(
                f"{_where(path, module)} owns the parameter {name!r} of shape {tuple(tensor.shape)}, which norm "
                f"{spec.name!r} does not declare; it declares {', '.join(spec.tensors)}. "
                f"{_remedy(module, {name: 'scale'})}"
            )
        if self._asks(module):
            own = dict(module.named_parameters(recurse=False))
            raise RoleError(
                f"{_where(path, module)} owns the parameter {name!r} of shape {tuple(tensor.shape)} and seems to "
                f"normalize, but no norm speaks for that type, and {self.rule.why or 'this rule'} treats such layers "
                f"apart. {_remedy(module, {key: 'shift' if 'bias' in key else 'scale' for key in own})} Where it does "
                "not normalize, each is a 'weight'. For fednorm.convert, fednorm.declare says what layer it is like."
            )
        return Kind.WEIGHT

    def _buffer(self, path: str, module: nn.Module, name: str, tensor: Tensor) -> Kind:
        """Return that a buffer is a constant, or refuse it."""
        seen, place = self.observation, (path, name)
        about = f"{_where(path, module)} owns the buffer {name!r} of shape {tuple(tensor.shape)}"
        if name in module._non_persistent_buffers_set:
            if place in seen.rewritten:
                raise RoleError(
                    f"{about}, which training changes step by step and the state dict leaves out: one client's values "
                    "would be the next one's. Register it with persistent=True. If nothing depends on what is left "
                    f"there: {_call(module, {name: 'constant'})}."
                )
            return Kind.CONSTANT
        if not seen.reason and place not in seen.written:
            return Kind.CONSTANT
        spec = spec_of(module)
        why = f"whether training writes it is not known, for {seen.reason}" if seen.reason else "which training writes"
        silent = "no norm speaks for that type"
        if spec:
            silent = f"norm {spec.name!r} does not declare it; it declares {', '.join(spec.tensors)}"
        known = {*declared_tensors(type(module)), *(spec.tensors if spec else ())}
        kinds = {
            other: "constant" if seen.reason else "weight" if buffer.is_floating_point() else "count"
            for other, buffer in module.named_buffers(recurse=False)
            if other not in known and (seen.reason or (path, other) in seen.written)
        }
        raise RoleError(
            f"{about}: {why}, and {silent}. So whether it may be averaged is unknown. {_remedy(module, kinds)}"
        )

    def _asks(self, module: nn.Module) -> bool:
        """Return whether a layer without a card normalizes, where the rule treats such layers apart."""
        apart = {self.rule[kind] for kind in (Kind.SCALE, Kind.SHIFT)} != {self.rule[Kind.WEIGHT]}
        if not apart or not per_channel(module) or declaration_of(module) is not None:
            return False
        if id(module) not in self._normalizing:
            self._normalizing[id(module)] = normalizes(module)
        return self._normalizing[id(module)] is True


def _call(module: nn.Module, kinds: Mapping[str, str]) -> str:
    return f"fednorm.declare_tensors({type(module).__name__}, {', '.join(f'{k}={v!r}' for k, v in kinds.items())})"


def _remedy(module: nn.Module, kinds: Mapping[str, str]) -> str:
    """Return a call that lets the plan place a module's tensors, and what else may be said there."""
    return (
        f"Say what it is, once, after the class is defined: {_call(module, kinds)}. Kinds: 'weight' is averaged; "
        "'scale', 'shift' are learned by a normalization layer; 'mean', 'var', 'count' are running statistics; "
        "'constant' never changes."
    )


def _refuse_no_op(model: nn.Module, plan: NormPlan, rule: RoleRule) -> None:
    if rule.frozen:
        _refuse_frozen(plan, rule, roles_at(model, rule))
    present = {entry.kind for entry in plan.entries}
    if not rule.roles or present & set(rule.roles):
        return
    wanted = ", ".join(kind.value for kind in rule.roles)
    known = [recognition for module in model.modules() if (recognition := recognition_of(module)) is not None]
    layers = any(recognition.spec is None or recognition.spec.normalizes for recognition in known)
    convert = ": fednorm.convert(model, 'batch_norm')" if layers else ", built with norm 'batch_norm'"
    raise RoleError(
        f"{rule.why or 'This rule'} acts on tensors of kind {wanted}, and this {type(model).__name__} has none: "
        f"it would silently be FedAvg. Use a network whose normalization layers have them{convert}; "
        "or strategy 'fedavg'."
    )


def _refuse_frozen(plan: NormPlan, rule: RoleRule, places: Mapping[str, Role]) -> None:
    """Refuse a rule all of whose tensors are frozen: it would be FedAvg under another name."""
    meant = [entry for entry in plan.entries if entry.key in places or entry.kind in rule.roles]
    if not meant or any(entry.role is not Role.CONSTANT for entry in meant):
        return
    keys = ", ".join(entry.key for entry in meant[:3])
    raise RoleError(
        f"{rule.why or 'This rule'}; train.trainable leaves all {len(meant)} such tensors ({keys}, …) as they are: it "
        "would silently be FedAvg. Train them too (train.trainable = 'norm,head', or 'all'), or take strategy 'fedavg'."
    )
