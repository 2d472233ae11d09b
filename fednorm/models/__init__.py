"""The architectures: one file each.

A model is given a :class:`~fednorm.spec.Norm` and asks it for every convolution, every normalization layer and every
nonlinearity; it never names a norm class. So one file serves an activation normalization, a weight reparameterization
and the normalizer-free residual form alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn

from fednorm.cards import MODELS, Card
from fednorm.errors import ConfigError, DataError, canonical
from fednorm.options import one_of
from fednorm.rng import torch_seeded
from fednorm.spec import ACTIVATIONS, Norm


class Make(Protocol):
    """Builds an architecture from arguments that :func:`make_model` has checked."""

    def __call__(self, norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
        """Return the model, initialised from PyTorch's process-wide generator."""


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

    expects: ClassVar[str] = "A model is a callable that returns a network, or a ModelSpec."

    @property
    def maker(self) -> Make:
        """What builds it."""
        return self.make

    @property
    def has_width(self) -> bool:
        """Whether the number of channels can be chosen."""
        return self.width > 0


def require_images(model: str, images: Tensor, image_size: int) -> None:
    """Require images of shape (N, 3, image_size, image_size), for a model that is built for one size.

    Raises:
        DataError: They are of another shape.
    """
    expected = (3, image_size, image_size)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise DataError(
            f"this {model} takes images of shape (N, {', '.join(map(str, expected))}); got {tuple(images.shape)}. "
            "Resize the images, or build the model with their image_size."
        )


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
    """Return the model called ``name`` in training mode, float32, on the CPU.

    It maps images of shape (N, 3, image_size, image_size) to logits of shape (N, num_classes). Its initial weights
    depend on ``seed``, the model and the norm, on nothing else; the process-wide generator is left as it was. Two
    norms that draw nothing themselves start from the same convolutions.

    Args:
        name: A name of :data:`~fednorm.cards.MODELS`; dashes are read as underscores.
        norm: The normalization method.
        num_classes: Number of logits.
        image_size: Height and width of the images, in pixels; 0 for the published size.
        width: Channels of the first convolution, or features of the first linear layer; 0 for the published width.
        seed: Of the initial weights.
        activation: A name of :data:`~fednorm.spec.ACTIVATIONS` that takes the place of every ReLU and ReLU6 of the
            architecture, scaled where the norm says so; dashes are read as underscores. Empty for the architecture's
            own. The initial weights are the same.
        options: The model's own options.

    Raises:
        UnknownNameError: There is no such model.
        ConfigError: The size, the width or the number of classes does not fit the architecture; there is no such
            activation, or the architecture has no ReLU that it could replace.
    """
    spec = MODELS[name]
    size = image_size or spec.input_size
    if num_classes < 1:
        raise ConfigError(f"model {spec.name} needs at least 1 class; got num_classes = {num_classes}.")
    if size < spec.min_size or size % spec.size_step:
        multiple = f" that is a multiple of {spec.size_step}" if spec.size_step > 1 else ""
        raise ConfigError(
            f"model {spec.name} takes square images of at least {spec.min_size} pixels a side{multiple}; "
            f"got image_size = {size}. Set data.image_size, e.g. to {spec.input_size}, its published size."
        )
    if width and not spec.has_width:
        wide = ", ".join(other.name for other in MODELS if other.has_width)
        raise ConfigError(
            f"model {spec.name} has a fixed width; got width = {width}. "
            f"Leave model.width at 0, or take a model that has it: {wide}."
        )
    if width < 0 or (width and width % spec.width_step):
        raise ConfigError(
            f"model {spec.name} takes a width that is a positive multiple of {spec.width_step}, "
            f"or 0 for its own, {spec.width}; got width = {width}."
        )
    asked = _OtherActivation(norm, canonical(activation)) if activation else None
    with torch_seeded(seed, "model", spec.name):
        model = spec.make(
            norm if asked is None else cast(Norm, asked),
            num_classes=num_classes,
            image_size=size,
            width=width or spec.width,
            **(options or {}),
        )
        if asked is not None and not asked.replaced:
            raise ConfigError(
                f"model {spec.name} has no ReLU that {asked.name} could take the place of. Leave model.activation "
                "empty, or take another model."
            )
        return norm.prepare(model)


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
