"""What a normalization method's file declares: the method with its options, and its identity card."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from fednorm.blocks import Attention
from fednorm.cards import Card
from fednorm.roles import Carry, Kind

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "selu": nn.SELU,
    "identity": nn.Identity,
}
"""The nonlinearities a model may ask a norm for, by name."""


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of a layer is, and what an experience's boundary does with it."""

    kind: Kind
    carry: Carry = Carry.KEEP


class HookedLayer:
    """A layer that takes part in the training step beyond its forward pass; a mixin beside ``nn.Module``.

    :class:`~fednorm.training.step.TrainingStep` finds such layers and calls these methods; each does nothing unless
    overridden.
    """

    def set_tasks(self, tasks: Tensor | None, num_tasks: int) -> None:
        """Be told about the coming batch; called before every training forward.

        Args:
            tasks: The task number of every sample, integers in [0, ``num_tasks``), shape (N,). None where tasks are
                unknown, as in a federation: the layer then does what it documents for a single task.
            num_tasks: How many tasks have been seen, the present one included; the present one is ``num_tasks - 1``
                unless :meth:`set_current_task` says otherwise.
        """

    def set_current_task(self, task: int) -> None:
        """Be told which task is being learned; called after :meth:`set_tasks` where it is not ``num_tasks - 1``.

        An experience that comes again is the task that it was.
        """

    def penalty(self) -> Tensor | None:
        """Return a term of the loss, a scalar; called after every training forward. None for no term."""
        return None

    def end_experience(self) -> None:
        """Be told that an experience has ended."""


class TaskedLayer(HookedLayer):
    """A layer that balances the tasks of a batch, and whose moments a federation can keep by task; a mixin too.

    Attributes:
        unbiased: Whether its running variance is of unbiased batch variances.
    """

    unbiased: ClassVar[bool] = False

    @property
    def tasks(self) -> Tensor | None:
        """The task of every sample of the latest batch, shape (N,); None where there is one task."""
        raise NotImplementedError

    @property
    def eta(self) -> float:
        """The weight that the latest training batch had in the running moments."""
        raise NotImplementedError

    def task_shares(self, counts: Tensor) -> Tensor:
        """Return the share of each task that has been seen in what the layer normalizes with; they sum to 1.

        Args:
            counts: The mean number of samples of each in a batch, shape (T,); 0 for one that did not come.
        """
        raise NotImplementedError


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

    @property
    def on_tokens(self) -> Norm:
        """The method as it normalizes a transformer's tokens: itself, unless its options leave that open.

        A method that lets one choose between moments of a whole sample and moments at each position takes the latter:
        it is what layer normalization means in a transformer.
        """
        return self

    def token_layer(self, num_channels: int) -> nn.Module:
        """Return what normalizes a transformer's tokens: the layer for (N, C, L) of :attr:`on_tokens`.

        A method that takes statistics from the batch takes them from all tokens of all samples.

        Args:
            num_channels: C, the features of a token.

        Raises:
            ConfigError: The method cannot be built for tokens.
        """
        return self.on_tokens.layer(num_channels, 1)

    def attention(self, width: int, heads: int, grid: tuple[int, int]) -> Attention:
        """Return a transformer's self-attention: softmax attention, unless the method brings another.

        Args:
            width: Features of a token.
            heads: Number of heads.
            grid: Rows and columns of the patches; other tokens stand before them.

        Raises:
            ConfigError: ``heads`` does not divide ``width``, or the method cannot be built for these numbers.
        """
        return Attention(width, heads, grid)

    @property
    def brings_attention(self) -> bool:
        """Whether :meth:`attention` returns the method's own instead of softmax attention."""
        return False

    def residual(self, branches: int) -> nn.Module | None:
        """Return what joins a residual branch to its shortcut, called with (shortcut, branch); None for their sum.

        Args:
            branches: How many branches the network has.
        """
        del branches
        return None

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

    @property
    def brings_activation(self) -> bool:
        """Whether :meth:`activation` returns the method's own nonlinearity, whichever a model asks for."""
        return False

    @property
    def normalizer(self) -> Norm:
        """The method whose layers and convolutions this one has: itself, unless it stands beside another."""
        return self

    def divides(self, new: int, memory: int) -> bool:
        """Return whether the method does on such a batch what it is for; True unless it needs to tell the two apart.

        Args:
            new: New samples of a batch.
            memory: Samples from a learner's memory that follow them in the same forward pass.
        """
        del new, memory
        return True

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

    def initialize(self, model: nn.Module) -> None:
        """Draw the initial weights of a network that was just built, where the method has its own; in place.

        Called once, after :meth:`prepare`, with PyTorch's process-wide generator in the stream of initial weights. A
        conversion keeps the weights that there are, and never calls it.

        Args:
            model: The network.
        """

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
class NormSpec(Card):
    """The identity card of a normalization method.

    Attributes:
        make: The :class:`Norm` subclass; its fields are the options.
        layers: The layer types the method speaks for, with their descendants.
        tensors: For each tensor such a layer may own, what it is.
        convolution: The method's own convolution, which computes its weight from the tensors of an ordinary one.
        normalizes: True where the method's layers normalize activations, False where it reparameterizes weights or
            does nothing. A strategy about normalization layers refuses a network without any.
        batch_coupled: True where one sample's output depends on the others in its batch (in training). A layer for
            which it is otherwise than its card says has an attribute of that name.
        coupled_in_evaluation: True where it does so in evaluation too.
        train_eval_differ: True where evaluation computes something else than training.
        scale_invariant: True where the method's layers give the same output, up to eps, for an input multiplied by any
            positive number, so that the length of the weight before them does not matter.
        tried_on: A built-in model that has what the method acts on; not every network has attention, or branches.
        thresholds: True where the input's side of a threshold decides something, so that a rounding of it may change
            the output by more than a rounding.
        exact_backward: False where the backward pass is, by the method, not the derivative of the forward pass: an
            approximation (as power_norm's), or with factors that count as constants (as batch_renorm's r and d).
    """

    make: type[Norm]
    layers: tuple[type[nn.Module], ...] = ()
    tensors: Mapping[str, TensorSpec]
    convolution: type[nn.Conv2d] | None = None
    normalizes: bool = True
    batch_coupled: bool = False
    coupled_in_evaluation: bool = False
    train_eval_differ: bool = False
    scale_invariant: bool = True
    tried_on: str = "digits_cnn"
    exact_backward: bool = True
    thresholds: bool = False

    expects: ClassVar[str] = "A norm is a subclass of fednorm.spec.Norm, or a NormSpec beside it."

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return the card that stands beside a subclass of :class:`Norm`, or one made for it.

        A card made for it declares no layer: the layers must be of types that other norms speak for, or be declared.
        """
        kind = method if inspect.isclass(method) else type(method)
        if not issubclass(kind, Norm):
            return None
        beside = vars(sys.modules.get(kind.__module__, object)).values() if kind.__module__ in sys.modules else ()
        own = next((card for card in beside if isinstance(card, cls) and card.make is kind), None)
        return own or cls(
            name=reference, summary=(kind.__doc__ or "").strip().partition("\n")[0], make=kind, tensors={}
        )

    @property
    def maker(self) -> type[Norm]:
        """The method's class."""
        return self.make

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range."""
        self.made(options)

    def made(self, options: Mapping[str, Any] | None = None) -> Norm:
        """Return the method with the given options.

        Raises:
            ConfigError: It has no such option, or the option's value is out of range.
        """
        return self.make(**(options or {}))
