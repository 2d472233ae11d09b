"""What users say of their own layers' tensors: the last word on what a tensor is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.roles import Kind

_DECLARED: dict[type[nn.Module], dict[str, Kind]] = {}


def declare_tensors(layer: type[nn.Module], **kinds: str | Kind) -> None:
    """Say what some tensors of a class of layers are, for every strategy; the last call for a tensor counts.

        fednorm.declare_tensors(Normalize, mean="constant", std="constant")
        fednorm.declare_tensors(ScaleNorm, g="scale")

    It goes before what a norm's card says and before what is found out by a training step, and holds for descendants
    too. Call it where the class is defined, so that every process of a run knows it. A whole layer that is like one
    that is known needs one word less: ``fednorm.declare(MyNorm, like=nn.LayerNorm)``.

    Args:
        layer: The class that owns the tensors.
        **kinds: For each tensor, by its name in the layer, a :class:`~fednorm.roles.Kind`: ``weight`` is averaged by
            every strategy; ``scale``, ``shift`` and ``gate`` are learned, ``mean``, ``var``, ``quadratic``,
            ``deviation``, ``count`` and ``grad_stat`` are running statistics, of a normalization layer, and stay on the
            client where the strategy says so; ``constant`` is never sent, and is the same everywhere.

    Raises:
        ConfigError: ``layer`` is not a class of modules, or nothing is declared.
        UnknownNameError: There is no such kind.

    Example:
        >>> class Normalize(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.tensor([0.5]))
        >>> fednorm.declare_tensors(Normalize, mean="constant")
        >>> FedAvg(nn.Sequential(Normalize(), nn.Linear(1, 1))).plan.keys(Role.CONSTANT)
        ('0.mean',)
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ConfigError(f"declare_tensors takes a class of modules, such as type(layer); got {layer!r:.100}.")
    if not kinds:
        raise ConfigError(
            f"Say what a tensor of {layer.__name__} is, e.g. declare_tensors({layer.__name__}, table='constant')."
        )
    known = {kind.value for kind in Kind}
    for name, kind in kinds.items():
        if canonical(str(kind)) not in known:
            raise unknown_name(f"kind of tensor, said of {layer.__name__}.{name},", str(kind), known)
    _DECLARED.setdefault(layer, {}).update({name: Kind(canonical(str(kind))) for name, kind in kinds.items()})


def declared_tensors(layer: type[nn.Module]) -> Mapping[str, Kind]:
    """Return what was said of a class's tensors, by name; the nearest ancestor that says something of one counts."""
    merged: dict[str, Kind] = {}
    for base in reversed(layer.__mro__):
        merged |= _DECLARED.get(base, {})
    return merged


def forget_tensors(layer: type[nn.Module]) -> None:
    """Take back what was said of a class itself."""
    _DECLARED.pop(layer, None)
