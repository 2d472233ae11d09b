"""What a normalization method's file declares: the method with its options, and its identity card."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fednorm.roles import Carry, Kind

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}
"""The nonlinearities a model may ask a norm for, by name."""


@dataclass(frozen=True)
class Citation:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    arxiv: str = ""
    where: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a layer is, and what an experience's boundary does with it."""

    kind: Kind
    carry: Carry = Carry.KEEP


class HookedLayer:
    """A layer that takes part in the training step beyond its forward pass; a mixin beside ``nn.Module``.

    :class:`~fednorm.step.TrainingStep` finds such layers and calls these methods; each does nothing unless overridden.
    """

    def set_tasks(self, tasks: Tensor | None, num_tasks: int) -> None:
        """Be told about the coming batch; called before every training forward.

        Args:
            tasks: The task number of every sample, integers in [0, ``num_tasks``), shape (N,). None where tasks are
                unknown, as in a federation: the layer then does what it documents for a single task.
            num_tasks: How many tasks have been seen, the present one included; the present one is ``num_tasks - 1``.
        """

    def penalty(self) -> Tensor | None:
        """Return a term of the loss, a scalar; called after every training forward. None for no term."""
        return None

    def end_experience(self) -> None:
        """Be told that an experience has ended."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalization method with its options: what a model is given in place of a layer class.

    Subclasses are frozen dataclasses whose fields *are* the method's options. A method overrides what it changes:
    an activation normalization :meth:`layer`, a weight reparameterization :attr:`conv_layer`.
    """

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return what stands after a convolution or a linear layer.

        Args:
            num_channels: C, the number of channels or features.
            spatial_dims: Number of axes after C: 2 for (N, C, H, W), 1 for (N, C, L), 0 for (N, C).

        Returns:
            A module that maps a tensor to one of the same shape.
        """
        del num_channels, spatial_dims
        return nn.Identity()

    def layer_for(self, num_channels: int, spatial_dims: Collection[int]) -> nn.Module:
        """Return a layer for inputs whose number of axes after C is one of several, where that cannot be known.

        Unless overridden, the layer for the largest number: most methods have one layer for all.

        Args:
            num_channels: C.
            spatial_dims: The numbers in question, at least one; each is one that :meth:`layer` takes.

        Raises:
            ConfigError: The method cannot be built for one of them.
        """
        return [self.layer(num_channels, dims) for dims in sorted(spatial_dims)][-1]

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> nn.Conv2d:
        """Return a 2-D convolution: the method's :meth:`conv_layer`, with a bias where nothing else shifts.

        Args:
            in_channels: Channels in.
            out_channels: Channels out.
            kernel_size: Size of the kernel.
            stride: Stride.
            padding: Padding.
            dilation: Dilation.
            groups: Number of channel groups.
            bias: Whether the architecture has a bias here *when a normalization layer follows*. A method that
                puts no shift after the convolution (:attr:`shifts`) has a bias all the same.
            padding_mode: Padding mode.

        Returns:
            The convolution.
        """
        return self.conv_layer(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias or not self.shifts,
            padding_mode=padding_mode,
        )

    @property
    def conv_layer(self) -> Callable[..., nn.Conv2d]:
        """The convolution's class, with the method's own arguments; a weight reparameterization overrides it."""
        return nn.Conv2d

    @property
    def shifts(self) -> bool:
        """Whether the method's layer adds a learned shift, which makes a convolution's bias redundant."""
        return True

    def activation(self, name: str = "relu") -> nn.Module:
        """Return the nonlinearity called ``name`` (a key of :data:`ACTIVATIONS`), scaled where the method says so."""
        return ACTIVATIONS[name]()

    def for_stream(self, *, num_tasks: int, batch_ratio: int) -> Norm:
        """Return this method fitted to what trains with it on a stream; itself unless the method needs to know.

        Args:
            num_tasks: The stream's number of tasks.
            batch_ratio: New samples for each memory sample of a batch; 0 where there is no memory, or no such integer.
        """
        del num_tasks, batch_ratio
        return self

    @property
    def inserts(self) -> bool:
        """Whether ``convert`` puts layers into a network that has none, before its nonlinearities; else it refuses."""
        return False

    def prepare(self, model: nn.Module) -> nn.Module:
        """Do what the method does to a network that was just built with it or converted to it.

        Args:
            model: The network, with its initial weights; it may be changed in place.

        Returns:
            The network to use: the one given, unless the method says otherwise.
        """
        return model

    def after_update(self, model: nn.Module) -> Callable[[], None] | None:
        """Return what is to be done to a network's parameters after every update of the optimizer, or None.

        Called once, with the network's initial parameters and before any checkpoint is loaded, so that what it returns
        may refer to them. What it returns may have ``state_dict()`` and ``load_state_dict()`` of plain tensors, which
        a resumed run needs.

        Args:
            model: The network, as :meth:`prepare` returned it.

        Raises:
            ConfigError: The method cannot do it to this network.
        """
        del model
        return None

    @property
    def residual_alpha(self) -> float | None:
        """The NF residual scale alpha, or None for an ordinary residual sum.

        Where it is a number, a residual network computes ``h + alpha * skip_gain * f(beta * h)`` with
        ``beta = 1 / expected standard deviation of h`` (Brock et al., arXiv 2101.08692).
        """
        return None


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """The identity card of a normalization method.

    Attributes:
        name: The method's name, equal to its file's stem.
        summary: One sentence with the formula.
        citation: Where it was published.
        make: The :class:`Norm` subclass; its fields are the options.
        layers: The layer types the method speaks for, with their descendants.
        tensors: For each tensor such a layer may own, what it is.
        normalizes: True where the method's layers normalize activations, False where it reparameterizes weights or
            does nothing. A strategy about normalization layers refuses a network without any.
        batch_coupled: True where one sample's output depends on the others in its batch (in training).
        train_eval_differ: True where evaluation computes something else than training.
        deviations: Where we differ from the paper or its official code.
    """

    name: str
    summary: str
    citation: Citation
    make: type[Norm]
    layers: tuple[type[nn.Module], ...] = ()
    tensors: Mapping[str, TensorSpec]
    normalizes: bool = True
    batch_coupled: bool = False
    train_eval_differ: bool = False
    deviations: tuple[str, ...] = ()
