"""The norm plan: for every entry of a model's state dict, what it is and what the federation does with it.

Kinds come from the layer's *type* (or its nearest ancestor), never from its name: on a ResNet-18 with torchvision's
names, a test for ``bn`` in the key misses 15 of the 100 BatchNorm entries (``downsample.1``). A strategy's
:class:`~fednorm.roles.RoleRule` turns kinds into roles. What the plan cannot place, it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fednorm.errors import RoleError
from fednorm.norms import spec_of
from fednorm.roles import Kind, Role, RoleRule


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

    @property
    def bytes_sent(self) -> int:
        """Return the bytes of tensors one client receives in a round; it sends back as many."""
        return sum(self.by_key[key].nbytes for key in self.sent)

    def moments(self) -> Iterator[tuple[str, str]]:
        """Yield the keys (mean, variance) of every layer that has both, in order."""
        means = {entry.layer: entry.key for entry in self.entries if entry.kind is Kind.MEAN}
        for entry in self.entries:
            if entry.kind is Kind.VAR and entry.layer in means:
                yield means[entry.layer], entry.key

    def summary(self, num_clients: int) -> dict[str, int]:
        """Return the numbers of entries by role, and the bytes that a round with ``num_clients`` clients sends."""
        counts = {role.value: self.count(role) for role in Role}
        return {**counts, "bytes_per_round": 2 * num_clients * self.bytes_sent}

    def bytes_by_role(self) -> dict[str, int]:
        """Return the bytes of one client's copy of the entries, by role."""
        return {role.value: sum(entry.nbytes for entry in self.entries if entry.role is role) for role in Role}

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

    Args:
        model: The model.
        rule: The strategy's map from kinds to roles.

    Returns:
        The plan; it covers the state dict exactly.

    Raises:
        RoleError: A layer owns a tensor whose kind nobody declared, or the rule would do nothing on this model.
    """
    state = model.state_dict(keep_vars=True)
    entries = {entry.key: entry for entry in _entries(model, rule) if entry.key in state}
    missing = [key for key in state if key not in entries]
    if missing:
        raise RoleError(
            f"The state dict has entries that no module of the model owns: {', '.join(missing[:5])}. "
            "A custom state_dict() cannot be placed; keep parameters and buffers on their modules."
        )
    plan = NormPlan(tuple(entries[key] for key in state))
    _refuse_no_op(model, plan, rule)
    return plan


def _entries(model: nn.Module, rule: RoleRule) -> Iterator[Entry]:
    for path, module in model.named_modules(remove_duplicate=False):
        kind_of, norm = _kinds(path, module)
        own = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in own:
            if name in module._non_persistent_buffers_set:
                continue
            kind = kind_of(name, tensor)
            yield Entry(
                key=f"{path}.{name}" if path else name,
                layer=path,
                layer_type=type(module).__name__,
                norm=norm,
                kind=kind,
                role=rule[kind],
                shape=tuple(tensor.shape),
                nbytes=tensor.numel() * tensor.element_size(),
                dtype=str(tensor.dtype).removeprefix("torch."),
            )


def _kinds(path: str, module: nn.Module) -> tuple[Callable[[str, Tensor], Kind], str]:
    """Return how to tell the kind of a module's own tensors, and the name of the method that speaks for it."""
    where = f"module {path or '(the model itself)'!r} ({type(module).__name__})"
    spec = spec_of(module)
    if spec is not None:

        def declared(name: str, tensor: Tensor) -> Kind:
            if name not in spec.tensors:
                raise RoleError(
                    f"{where} owns {name!r} of shape {tuple(tensor.shape)}, which norm {spec.name!r} does not declare; "
                    f"it declares {', '.join(spec.tensors)}. Add the tensor with its Kind to that norm's SPEC."
                )
            return spec.tensors[name].kind

        return declared, spec.name

    def plain(name: str, tensor: Tensor) -> Kind:
        learned = isinstance(tensor, nn.Parameter)
        if learned and "norm" not in type(module).__name__.lower():
            return Kind.WEIGHT
        raise RoleError(
            f"{where} owns {'the parameter' if learned else 'the buffer'} {name!r} of shape {tuple(tensor.shape)} "
            "and no norm speaks for that type, so whether it may be averaged is unknown. Declare the type in a norm's "
            "SPEC (layers and tensors), or replace the layer: fednorm.convert(model, 'group_norm')."
        )

    return plain, ""


def _refuse_no_op(model: nn.Module, plan: NormPlan, rule: RoleRule) -> None:
    present = {entry.kind for entry in plan.entries}
    if not rule.roles or present & set(rule.roles):
        return
    wanted = ", ".join(kind.value for kind in rule.roles)
    raise RoleError(
        f"{rule.why or 'This rule'} acts on tensors of kind {wanted}, and this {type(model).__name__} has none: "
        "it would silently be FedAvg. Use a network whose normalization layers have them "
        "(for example norm 'batch_norm'), or strategy 'fedavg'."
    )
