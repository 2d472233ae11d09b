"""Inputs that a model of unknown origin may take: guessed from its layers and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

SIDES = (32, 64, 28, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 331, 384, 448, 512)
"""Heights and widths to try, in pixels, after the size that the model names."""


@dataclass(frozen=True)
class Example:
    """A batch's shape, and how to fill it.

    Attributes:
        shape: Shape of one sample, without the batch's axis.
        vocabulary: Number of different integers, for a model that begins with an embedding; 0 for floats.
    """

    shape: tuple[int, ...]
    vocabulary: int = 0

    def batch(self, size: int, generator: torch.Generator, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return random samples, shape (size, ...): standard normal floats, or integers below the vocabulary."""
        if self.vocabulary:
            return torch.randint(self.vocabulary, (size, *self.shape), generator=generator, device="cpu").to(device)
        return torch.randn(size, *self.shape, generator=generator, device="cpu").to(device, dtype)


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield inputs that a model may take, the likeliest first, each once.

    Its first layers that say how many channels or features they take are believed, in the order of registration; so is
    an image size that the model names (timm's ``default_cfg``, an attribute ``image_size`` or ``input_size``, Hugging
    Face's ``config``). Everything else is tried.
    """
    seen: set[Example] = set()
    for example in _all(model):
        if example not in seen:
            seen.add(example)
            yield example


def _all(model: nn.Module) -> Iterator[Example]:
    named = list(dict.fromkeys(size for value in _named(model) if (size := _plane(value)) is not None))
    sides = [(side, side) for side in SIDES]
    # A small image costs less; a model that names a size often takes no other.
    planes = [*sides[:2], *named, *sides[2:]]
    # Where the model names channels too, they count: its first convolution may come after a transform.
    yield from _named_images(model)
    firsts = list(dict.fromkeys(first for module in model.modules() if (first := _takes(module)) is not None))[:4]
    for kind, channels in firsts:
        if kind == "image":
            yield from (Example((channels, *plane)) for plane in planes)
        elif kind == "tokens":
            yield from (Example((length,), channels) for length in (16, 8, 1))
        elif kind == "sequence":
            yield from (Example((channels, length)) for length in (32, 128, 1024, 16000))
        elif kind == "volume":
            yield from (Example((channels, depth, *plane)) for depth in (8, 16, 32) for plane in planes[:4])
        elif kind == "steps":
            yield Example((16, channels))
        else:
            yield Example((channels,))
            yield from _images_of(channels)
            yield Example((16, channels))
    if not firsts:
        yield from (Example((3, *plane)) for plane in planes[:4])
        yield from (Example((size,)) for size in (8, 16))


def _images_of(features: int) -> Iterator[Example]:
    """Yield square images with so many pixels, for a linear layer after a flattening."""
    for channels in (1, 3):
        side = round((features / channels) ** 0.5)
        if channels * side * side == features:
            yield Example((channels, side, side))


def _takes(module: nn.Module) -> tuple[str, int] | None:
    """Return the kind of input that a layer takes and its channels, features or vocabulary; None where it is silent."""
    kinds: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str, str], ...] = (
        ((nn.Conv2d, nn.ConvTranspose2d), "image", "in_channels"),
        ((nn.Conv1d, nn.ConvTranspose1d), "sequence", "in_channels"),
        ((nn.Conv3d, nn.ConvTranspose3d), "volume", "in_channels"),
        (nn.Linear, "features", "in_features"),
        (nn.Embedding, "tokens", "num_embeddings"),
        (nn.RNNBase, "steps", "input_size"),
        (nn.BatchNorm2d, "image", "num_features"),
        (nn.InstanceNorm2d, "image", "num_features"),
        (_NormBase, "features", "num_features"),
    )
    for types, kind, attribute in kinds:
        size = getattr(module, attribute, None)
        if isinstance(module, types) and isinstance(size, int) and size > 0:
            return kind, size
    return None


def _named(model: nn.Module) -> Iterator[Any]:
    """Yield what a model or one of its children says of its input's size, in whatever form."""
    for module in (model, *model.children()):
        for config in (getattr(module, name, None) for name in ("default_cfg", "pretrained_cfg", "config")):
            yield from (_get(config, "input_size"), _get(config, "image_size"))
        yield from (getattr(module, name, None) for name in ("input_size", "image_size", "img_size"))


def _named_images(model: nn.Module) -> Iterator[Example]:
    """Yield images with the channels that the model names, small first, where its first convolution takes others."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    for value in _named(model):
        if isinstance(value, tuple | list) and len(value) == 3 and (plane := _plane(value)) and value[0] != first:
            yield from (Example((int(value[0]), *size)) for size in ((SIDES[1], SIDES[1]), plane))


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _plane(value: Any) -> tuple[int, int] | None:
    """Read a size: a number, (height, width), or (channels, height, width)."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value, value
    if isinstance(value, tuple | list) and len(value) in (2, 3) and all(isinstance(v, int) and v > 0 for v in value):
        return int(value[-2]), int(value[-1])
    return None
