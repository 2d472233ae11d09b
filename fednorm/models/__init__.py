"""The architectures: one file each, one line each in this table.

A model is given a :class:`~fednorm.spec.Norm` and asks it for every convolution, every normalization layer and every
nonlinearity; it never names a norm class. So one file serves an activation normalization, a weight reparameterization
and the normalizer-free residual form alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import nn

from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.rng import torch_seeded
from fednorm.spec import Citation, Norm

MODELS: tuple[str, ...] = (
    "alexnet",
    "digits_cnn",
    "mobilenet_v2",
    "resnet18",
)


class Make(Protocol):
    """Builds an architecture from arguments that :func:`make_model` has checked."""

    def __call__(self, norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
        """Return the model, initialised from PyTorch's process-wide generator."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The identity card of an architecture.

    Attributes:
        name: The model's name, equal to its file's stem.
        summary: One sentence with the layers.
        citation: Where it was published.
        make: Builds it.
        input_size: Height and width of the published input, in pixels; the default.
        min_size: Smallest height and width that leave something of an image after the last pooling.
        size_step: Height and width must be a multiple of it.
        width: Channels of the first convolution as published; 0 where the width is fixed.
        width_step: A width must be a multiple of it.
        deviations: Where we differ from the paper or its official code.
    """

    name: str
    summary: str
    citation: Citation
    make: Make
    input_size: int
    min_size: int = 1
    size_step: int = 1
    width: int = 0
    width_step: int = 1
    deviations: tuple[str, ...] = ()

    @property
    def has_width(self) -> bool:
        """Whether the number of channels can be chosen."""
        return self.width > 0


def model_spec(name: str) -> ModelSpec:
    """Return the identity card of the model called ``name``.

    Raises:
        UnknownNameError: There is no such model.
    """
    name = canonical(name)
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    spec: ModelSpec = import_module(f"fednorm.models.{name}").SPEC
    return spec


def make_model(
    name: str, norm: Norm, *, num_classes: int, image_size: int = 0, width: int = 0, seed: int = 0
) -> nn.Module:
    """Return the model called ``name`` in training mode, float32, on the CPU.

    It maps images of shape (N, 3, image_size, image_size) to logits of shape (N, num_classes). Its initial weights
    depend on ``seed``, the model and the norm, on nothing else; the process-wide generator is left as it was. Two
    norms that draw nothing themselves start from the same convolutions.

    Args:
        name: A name of :data:`MODELS`; dashes are read as underscores.
        norm: The normalization method.
        num_classes: Number of logits.
        image_size: Height and width of the images, in pixels; 0 for the published size.
        width: Channels of the first convolution; 0 for the published width.
        seed: Of the initial weights.

    Raises:
        UnknownNameError: There is no such model.
        ConfigError: The size, the width or the number of classes does not fit the architecture.
    """
    spec = model_spec(name)
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
        wide = ", ".join(other for other in MODELS if model_spec(other).has_width)
        raise ConfigError(
            f"model {spec.name} has a fixed width; got width = {width}. "
            f"Leave model.width at 0, or take a model that has it: {wide}."
        )
    if width < 0 or (width and width % spec.width_step):
        raise ConfigError(
            f"model {spec.name} takes a width that is a positive multiple of {spec.width_step}, "
            f"or 0 for its own, {spec.width}; got width = {width}."
        )
    with torch_seeded(seed, "model", spec.name):
        return spec.make(norm, num_classes=num_classes, image_size=size, width=width or spec.width)
