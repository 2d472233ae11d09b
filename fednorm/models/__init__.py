"""The architectures: one file each, strangers' by import path, torchvision's and timm's by name.

A model is given a :class:`~fednorm.spec.Norm` and asks it for every convolution, every normalization layer and every
nonlinearity; it never names a norm class. So one file serves an activation normalization, a weight reparameterization
and the normalizer-free residual form alike. A stranger's network that was not built so is converted to the norm
(:mod:`fednorm.models._foreign`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast

from torch import nn

from fednorm.cards import MODELS, Card
from fednorm.errors import ConfigError, canonical
from fednorm.limits import shown
from fednorm.models._feature_norm import normalize_features
from fednorm.models._weights import load_weights, weights_digest
from fednorm.options import one_of
from fednorm.rng import torch_seeded
from fednorm.spec import ACTIVATIONS, Norm

if TYPE_CHECKING:
    from fednorm.config import ModelChoice


class Make(Protocol):
    """Builds an architecture from arguments that :func:`make_model` has checked."""

    def __call__(self, norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
        """Return the model, initialised from PyTorch's process-wide generator."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a run asks of an architecture.

    Attributes:
        norm: The normalization method.
        num_classes: Number of logits.
        image_size: Height and width of the images, in pixels; 0 for the published size.
        width: Channels of the first convolution, or features of the first linear layer; 0 for the published width.
        activation: A name of :data:`~fednorm.spec.ACTIVATIONS` that takes the place of every ReLU and ReLU6 of the
            architecture, scaled where the norm says so; dashes are read as underscores. Empty for the architecture's
            own. The initial weights are the same.
        weights: A file of weights to start from, or ``pretrained``; empty for initial weights drawn from the seed.
        options: The model's own options.
        in_channels: Channels of the images.
        feature_norm: Whether what the head is given is brought to one length (:mod:`fednorm.models._feature_norm`).
    """

    norm: Norm
    num_classes: int
    image_size: int = 0
    width: int = 0
    activation: str = ""
    weights: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    in_channels: int = 3
    feature_norm: bool = False


@dataclass(frozen=True)
class Built:
    """A network, and what a reader of its results should know.

    Attributes:
        model: The network, in training mode, float32, on the CPU.
        notes: Where its weights come from and what a conversion did to it, one sentence each.
        conversion: The paths of the layers that a conversion replaced, by what they are; empty where there was none.
    """

    model: nn.Module
    notes: tuple[str, ...] = ()
    conversion: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Card):
    """The identity card of an architecture.

    Attributes:
        make: Builds it; its keyword-only arguments with a default are the model's own options.
        input_size: Height and width of the published input, in pixels; the default.
        min_size: Smallest height and width that leave something of an image after the last pooling.
        size_step: Height and width must be a multiple of it.
        width: Channels of the first convolution, or features of the first linear layer, as published; 0 where the
            width is fixed.
        width_step: A width must be a multiple of it.
    """

    make: Make
    input_size: int
    min_size: int = 1
    size_step: int = 1
    width: int = 0
    width_step: int = 1

    expects: ClassVar[str] = (
        "A model is a callable that takes num_classes and returns a network, an nn.Module's class that does, or a "
        "ModelSpec."
    )

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return a card for a callable or an nn.Module's class: see :class:`~fednorm.models._foreign.ForeignModel`.

        Raises:
            ConfigError: It is a network instead of what makes one, or it takes no ``num_classes``.
        """
        from fednorm.models._foreign import foreign_card

        return cast("Self | None", foreign_card(method, reference))

    @property
    def maker(self) -> Make:
        """What builds it."""
        return self.make

    @property
    def has_width(self) -> bool:
        """Whether the number of channels can be chosen."""
        return self.width > 0

    @property
    def stream(self) -> tuple[str, ...]:
        """The names of the stream that initial weights are drawn from."""
        return "model", self.name

    def pretrained(self) -> str:
        """Return the file of the published weights, in the local cache of the library that they are of.

        Raises:
            ConfigError: There are none, or they are not in the cache.
        """
        raise ConfigError(
            f"model {self.name} has no published weights. Leave model.weights empty, or name a file (.safetensors, "
            ".pt)."
        )

    def weights_digest(self, given: str) -> str:
        """Return what identifies given weights: 12 hexadecimal digits of their file's contents.

        Raises:
            ConfigError: There is no such file.
        """
        return weights_digest(given, self)

    def require(self, order: Order) -> None:
        """Refuse a size, a width, a number of classes or an activation that does not fit.

        Raises:
            ConfigError: One does not.
        """
        size, width = order.image_size, order.width
        if order.num_classes < 1:
            raise ConfigError(f"model {self.name} needs at least 1 class; got num_classes = {order.num_classes}.")
        if size < self.min_size or size % self.size_step:
            multiple = f" that is a multiple of {self.size_step}" if self.size_step > 1 else ""
            raise ConfigError(
                f"model {self.name} takes square images of at least {self.min_size} pixels a side{multiple}; "
                f"got image_size = {size}. Set data.image_size, e.g. to {self.input_size}, its published size."
            )
        if width and not self.has_width:
            wide = ", ".join(other.name for other in MODELS if other.has_width)
            raise ConfigError(
                f"model {self.name} has a fixed width; got width = {width}. "
                f"Leave model.width at 0, or take a model that has it: {wide}."
            )
        if width < 0 or (width and width % self.width_step):
            raise ConfigError(
                f"model {self.name} takes a width that is a positive multiple of {self.width_step}, "
                f"or 0 for its own, {self.width}; got width = {width}."
            )
        if order.activation and order.norm.brings_activation:
            raise ConfigError(
                f"model.activation is {shown(order.activation)}, and norm {type(order.norm).__name__} brings its own "
                "nonlinearity, which would take its place. Leave model.activation empty, or take another norm."
            )

    def build(self, order: Order) -> Built:
        """Return the network; called with PyTorch's process-wide generator at the start of :attr:`stream`.

        Raises:
            ConfigError: The architecture has no ReLU that the activation could replace, or the weights do not fit.
        """
        asked = _OtherActivation(order.norm, canonical(order.activation)) if order.activation else None

        def make(num_classes: int) -> nn.Module:
            return self.make(
                order.norm if asked is None else cast(Norm, asked),
                num_classes=num_classes,
                image_size=order.image_size,
                width=order.width or self.width,
                **order.options,
            )

        model = make(order.num_classes)
        if asked is not None and not asked.replaced:
            raise ConfigError(
                f"model {self.name} has no ReLU that {asked.name} could take the place of. Leave model.activation "
                "empty, or take another model."
            )
        model = order.norm.prepare(model)
        order.norm.initialize(model)
        return Built(model, load_weights(model, order.weights, self, make, order.num_classes))


def build_model(name: str, order: Order, *, seed: int = 0) -> Built:
    """Return the model called ``name`` in training mode, float32, on the CPU, with what there is to say of it.

    It maps images of shape (N, C, image_size, image_size) to logits of shape (N, num_classes). Its initial weights
    depend on ``seed``, the model and the norm, on nothing else; the process-wide generator is left as it was. Two
    norms that draw nothing themselves start from the same convolutions.

    Args:
        name: A name of :data:`~fednorm.cards.MODELS`, dashes read as underscores, or any other reference of one.
        order: What is asked of it.
        seed: Of the initial weights.

    Raises:
        UnknownNameError: There is no such model.
        ConfigError: The size, the width or the number of classes does not fit the architecture; there is no such
            activation, or the architecture has no ReLU that it could replace; a stranger's callable gives no network
            that maps these images to that many logits; the file of weights does not fit.
    """
    from dataclasses import replace

    spec = MODELS[name]
    order = replace(order, image_size=order.image_size or spec.input_size)
    spec.require(order)
    with torch_seeded(seed, *spec.stream), _small_enough(spec, order):
        built = spec.build(order)
    if not order.feature_norm:
        return built
    shape = (2, order.in_channels, order.image_size, order.image_size)
    return replace(built, notes=(*built.notes, normalize_features(built.model, order.num_classes, shape)))


@contextmanager
def _small_enough(spec: ModelSpec, order: Order) -> Iterator[None]:
    """Say in a sentence that a network cannot be held: a stranger's is not measured before it is built.

    Raises:
        ConfigError: What is done within asks for more memory than there is, or for more entries than can be numbered.
    """
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        if not isinstance(error, MemoryError | OverflowError) and not any(words in str(error) for words in _TOO_LARGE):
            raise
        raise ConfigError(
            f"model {spec.name} of width {shown(order.width or spec.width)} for images of {shown(order.image_size)} "
            "pixels a side is larger than this machine can hold. Lower model.width or the images' size, or take "
            "another model."
        ) from error


_TOO_LARGE = ("allocate memory", "not enough memory", "verflow")
"""What PyTorch says of tensors that are too large, in errors of several types."""


def make_model(
    name: str,
    norm: Norm,
    *,
    num_classes: int,
    image_size: int = 0,
    width: int = 0,
    seed: int = 0,
    activation: str = "",
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return what :func:`build_model` builds; the arguments are those of an :class:`Order`."""
    order = Order(
        norm=norm,
        num_classes=num_classes,
        image_size=image_size,
        width=width,
        activation=activation,
        options=options or {},
    )
    return build_model(name, order, seed=seed).model


def chosen_model(choice: ModelChoice[ModelSpec], norm: Norm, num_classes: int, image_size: int, seed: int) -> Built:
    """Return the model that a run's configuration names, as :func:`build_model` builds it."""
    order = Order(
        norm=norm,
        num_classes=num_classes,
        image_size=image_size,
        width=choice.width,
        activation=choice.activation,
        feature_norm=choice.feature_norm,
        weights=choice.weights,
        options=choice.options,
    )
    return build_model(choice.name, order, seed=seed)


def describe_model(choice: ModelChoice[ModelSpec], built: Built, num_classes: int, image_size: int) -> dict[str, Any]:
    """Return what a record keeps of a model: with its configuration enough to build it again without the data."""
    return {
        "name": choice.name,
        "num_classes": num_classes,
        "image_size": image_size,
        "notes": list(built.notes),
        **({"conversion": dict(built.conversion)} if built.conversion else {}),
    }


class _OtherActivation:
    """A norm that answers with another nonlinearity where a model asks for a ReLU; in all else it is the norm.

    A model gets every nonlinearity from its norm. So none is missed, whatever the norm wraps it in, and the model is
    never searched.

    Args:
        norm: The normalization method.
        name: The nonlinearity, a key of :data:`~fednorm.spec.ACTIVATIONS`.

    Raises:
        ConfigError: There is no such nonlinearity.
    """

    def __init__(self, norm: Norm, name: str) -> None:
        one_of("model", "activation", name, ACTIVATIONS)
        self.norm = norm
        self.name = name
        self.replaced = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.norm, name)

    def activation(self, name: str = "relu") -> nn.Module:
        """Return the other nonlinearity for ``relu`` and ``relu6``, and what the norm returns for any other name."""
        if name not in ("relu", "relu6"):
            return self.norm.activation(name)
        self.replaced += 1
        return self.norm.activation(self.name)
