"""``declare``: what fednorm cannot find out about a class, its user says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from fednorm import options
from fednorm.errors import ConfigError
from fednorm.norms import specs_by_layer
from fednorm.recognition.layers import DECLARED, Declaration, anchor_of
from fednorm.roles import Kind
from fednorm.spec import ACTIVATIONS, TensorSpec

Activation = str | type[nn.Module] | Callable[[nn.Module], nn.Module]


def declare(
    kind: type[nn.Module],
    *,
    like: type[nn.Module] | None,
    channels_first: bool | None = None,
    activation: Activation | None = None,
    tensors: Mapping[str, Kind | str] | None = None,
) -> type[nn.Module]:
    """Say what normalization layer a class is like; from then on, plans and conversions take it for one.

    Needed only for classes that fednorm does not recognise, by their type or by what they compute; it overrides what
    it would recognise. A descendant counts too, unless its forward pass is its own. Declare a class where you define
    it, and in every process that uses it.

        class CenteredNorm(nn.Module):                       # its formula is its own: (x - mean) * scale
            def __init__(self, channels):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(channels))

            def forward(self, x): ...                        # x: (N, C, H, W); ends in F.relu

        fednorm.declare(CenteredNorm, like=nn.LayerNorm, channels_first=True, activation="relu",
                        tensors={"scale": "scale"})
        fednorm.declare(NormalizedHead, like=None)           # no normalization layer: conversions leave it

    A conversion keeps the class's children (a dropout, an activation) after the new layer, in their order.

    Args:
        kind: The class.
        like: The layer that it is like: one of PyTorch's ``nn.BatchNorm*``, ``nn.GroupNorm``, ``nn.LayerNorm``,
            ``nn.RMSNorm``, ``nn.InstanceNorm*``, or a layer of fednorm's. None says that it is no normalization layer.
        channels_first: Whether its input is (N, C, ...) and not (N, ..., C); as ``like`` has it if None.
        activation: What its forward pass applies after normalizing, beside its children: a name (``relu``, ``relu6``,
            ``gelu``, ``silu``, ``elu``, ``tanh``, ``leaky_relu``, ``selu``), a class that is made without arguments,
            or a function that is given the layer and makes it.
        tensors: For each tensor that the class owns, what it is: a :class:`~fednorm.roles.Kind` or its value
            (``scale``, ``shift``, ``mean``, ``var``, ``count``, ...). Needed where its names are not those of ``like``;
            gamma and scale, beta and shift are understood.

    Returns:
        The class.

    Raises:
        ConfigError: ``kind`` or ``like`` is no such class, or an option is wrong.

    Example:
        >>> class Halved(nn.LayerNorm):  # a forward pass of its own: what it is cannot be seen
        ...     def forward(self, x):
        ...         return super().forward(x) / 2
        >>> _ = fednorm.declare(Halved, like=nn.LayerNorm)
        >>> model = fednorm.convert(nn.Sequential(nn.Linear(4, 4), Halved(4)), "rms_norm")
        >>> [type(layer).__name__ for layer in model.modules()][-1]
        'RMSNormLayer'
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"fednorm.declare expects a class of modules, such as type(layer); got {kind!r}.")
    if like is None and (channels_first is not None or activation is not None or tensors is not None):
        raise ConfigError(f"{kind.__name__} is declared not to be a normalization layer; leave the other options out.")
    if like is not None:
        _check_like(kind, like)
    DECLARED[kind] = Declaration(like, channels_first, _maker(activation), _kinds(kind, tensors))
    return kind


def _check_like(kind: type[nn.Module], like: type[nn.Module]) -> None:
    table = specs_by_layer()
    anchor = anchor_of(like, table) if isinstance(like, type) and issubclass(like, nn.Module) else None
    if anchor is None:
        raise ConfigError(
            f"{kind.__name__} is declared to be like {getattr(like, '__name__', repr(like))}, which fednorm does not "
            "know. Give one of nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm "
            "and nn.InstanceNorm*, or None where it is no normalization layer."
        )


def _maker(activation: Activation | None) -> Callable[[nn.Module], nn.Module] | None:
    if activation is None:
        return None
    if isinstance(activation, str):
        options.one_of("declare", "activation", activation, ACTIVATIONS)
        return partial(_make, ACTIVATIONS[activation])
    if isinstance(activation, nn.Module) or not callable(activation):
        raise ConfigError(
            f"declare.activation must be a name, a class or a function that makes the activation; got {activation!r}. "
            "Give e.g. nn.ReLU, or lambda layer: nn.LeakyReLU(layer.slope)."
        )
    return partial(_make, activation) if isinstance(activation, type) else activation


def _make(make: Callable[[], nn.Module], layer: nn.Module) -> nn.Module:
    del layer
    return make()


def _kinds(kind: type[nn.Module], tensors: Mapping[str, Kind | str] | None) -> Mapping[str, TensorSpec] | None:
    if tensors is None:
        return None
    try:
        return {name: TensorSpec(Kind(value)) for name, value in tensors.items()}
    except ValueError as error:
        raise ConfigError(
            f"The tensors of {kind.__name__} are declared with {error}; the kinds are "
            f"{', '.join(known.value for known in Kind)}."
        ) from None
