"""A method that acts beside the normalization layers, and leaves those to another method: its option ``beside``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Self, cast

from torch import nn

from fednorm.blocks import Attention
from fednorm.cards import NORMS
from fednorm.errors import ConfigError
from fednorm.limits import shown
from fednorm.spec import Norm


@dataclass(frozen=True, kw_only=True)
class BesideNorm(Norm):
    """The base of such methods: everything is the other method's, but for what a subclass overrides.

    Attributes:
        beside: Name or import path of the other method, which has its default options.

    Raises:
        ConfigError: It is no name.
        UnknownNameError: Nothing has that name.
    """

    beside: str = "layer_norm"

    def __post_init__(self) -> None:
        if not isinstance(self.beside, str):
            raise ConfigError(f"norm.beside names the norm beside this one, e.g. layer_norm; got {shown(self.beside)}.")
        # One object for all layers: some methods' layers share what they know by it.
        object.__setattr__(self, "_other", NORMS[self.beside].made())

    @property
    def other(self) -> Norm:
        """The other method."""
        return cast(Norm, vars(self)["_other"])

    @property
    def normalizer(self) -> Norm:
        """The method whose layers and convolutions these are."""
        return self.other.normalizer

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the other method's layer."""
        return self.other.layer(num_channels, spatial_dims)

    def layer_for(self, num_channels: int, spatial_dims: Collection[int]) -> nn.Module:
        """Return the other method's layer."""
        return self.other.layer_for(num_channels, spatial_dims)

    @property
    def on_tokens(self) -> Norm:
        """The other method as it normalizes tokens."""
        return self.other.on_tokens

    def attention(self, width: int, heads: int, grid: tuple[int, int]) -> Attention:
        """Return the other method's attention."""
        return self.other.attention(width, heads, grid)

    @property
    def brings_attention(self) -> bool:
        """Whether the other method has an attention of its own."""
        return self.other.brings_attention

    def residual(self, branches: int) -> nn.Module | None:
        """Return what joins a branch to its shortcut in the other method."""
        return self.other.residual(branches)

    @property
    def conv_layer(self) -> Callable[..., nn.Conv2d]:
        """The other method's convolution."""
        return self.other.conv_layer

    @property
    def shifts(self) -> bool:
        """Whether the other method's layer adds a learned shift."""
        return self.other.shifts

    def activation(self, name: str = "relu") -> nn.Module:
        """Return the other method's nonlinearity."""
        return self.other.activation(name)

    @property
    def brings_activation(self) -> bool:
        """Whether the other method has a nonlinearity of its own."""
        return self.other.brings_activation

    def divides(self, new: int, memory: int) -> bool:
        """Return whether the other method does on such a batch what it is for."""
        return self.other.divides(new, memory)

    def for_stream(self, *, num_tasks: int, batch_ratio: int) -> Self:
        """Return this method with the other one fitted to what trains with it on a stream."""
        fitted = replace(self)
        object.__setattr__(fitted, "_other", self.other.for_stream(num_tasks=num_tasks, batch_ratio=batch_ratio))
        return fitted

    @property
    def inserts(self) -> bool:
        """Whether the other method inserts layers."""
        return self.other.inserts

    def prepare(self, model: nn.Module) -> nn.Module:
        """Do what the other method does to a network.

        Raises:
            ConfigError: The network has nothing that one of the two acts on.
        """
        return self.other.prepare(model)

    def initialize(self, model: nn.Module) -> None:
        """Draw the other method's initial weights."""
        self.other.initialize(model)

    def after_update(self, model: nn.Module) -> Callable[[], None] | None:
        """Return what the other method does after every update."""
        return self.other.after_update(model)

    @property
    def residual_alpha(self) -> float | None:
        """The other method's residual scale."""
        return self.other.residual_alpha


def require_kind(model: nn.Module, kind: type[nn.Module], otherwise: str) -> None:
    """Require a network that has a module of a kind, which is what a method acts through.

    Raises:
        ConfigError: It has none, so that the method would do nothing.
    """
    if not any(isinstance(module, kind) for module in model.modules()):
        raise ConfigError(otherwise.format(model=type(model).__name__))
