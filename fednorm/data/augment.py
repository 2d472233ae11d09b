"""Random augmentation, drawn for each image of a batch, without a loop over images.

For uint8 images: the border is 0, which is black, as torchvision's transforms have it before the pixels are
normalized. Each is torchvision's transform of one image with parameters of its own for each image of the batch; where
pixels are computed they are brought back to uint8 as torchvision does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from fednorm.config.augmentations import spelled_out
from fednorm.errors import DataError

GREY = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in grey, torchvision's."""

TRIES = 10
"""How often a random resized crop is drawn until it lies inside the image, as in torchvision."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to the images of a batch, one after the other.

    Attributes:
        names: Of :data:`~fednorm.config.augmentations.NAMES`, or ``crop_flip``.
        degrees: ``rotate`` turns by an angle uniform in [-degrees, degrees].
        jitter: ``jitter`` multiplies brightness, contrast and saturation by factors uniform in [1 - jitter,
            1 + jitter].
    """

    names: tuple[str, ...] = ()
    degrees: float = 30.0
    jitter: float = 0.4

    @classmethod
    def of(cls, text: str, *, degrees: float = 30.0, jitter: float = 0.4) -> Augmentation:
        """Read names separated by commas; see :func:`~fednorm.config.augmentations.spelled_out`."""
        return cls(tuple(name for name in spelled_out(text).split(",") if name != "none"), degrees, jitter)

    @property
    def text(self) -> str:
        """The names, separated by commas, or ``none``."""
        return ",".join(self.names) or "none"

    def __bool__(self) -> bool:
        """Return whether anything is done."""
        return bool(self.names)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return new images of the same shape, type and device.

        Args:
            images: uint8, shape (n, C, H, W).
            generator: Drawn from by each augmentation in turn; what is drawn does not depend on the pixels.
        """
        acts: dict[str, Callable[[], Tensor]] = {
            "crop": lambda: crop_and_flip(images, generator, flip=False),
            "crop_flip": lambda: crop_and_flip(images, generator),
            "flip": lambda: flipped(images, draw_coins(len(images), generator)),
            "rotate": lambda: rotated(images, draw_angles(len(images), self.degrees, generator)),
            "jitter": lambda: jittered(images, *draw_jitter(len(images), self.jitter, generator)),
            "resized_crop": lambda: resized(
                images, draw_boxes(len(images), images.shape[2], images.shape[3], generator)
            ),
        }
        for name in self.names:
            images = acts[name]()
        return images


# Crop and flip --------------------------------------------------------------------------------------------------------


def crop_and_flip(images: Tensor, generator: torch.Generator, *, padding: int = 4, flip: bool = True) -> Tensor:
    """Crop each image at a random place of its padded self, and mirror it with probability one half.

    The standard augmentation of CIFAR (He et al., arXiv 1512.03385, section 4.2): ``padding`` black pixels on each
    side, a crop of the original size whose corner is uniform over the ``2 * padding + 1`` places of each axis, and a
    horizontal flip.

    Args:
        images: Shape (n, C, H, W), any type.
        generator: Drawn from three times, on its own device: n row offsets, n column offsets, n coins. The draws
            do not depend on the images, and coins are tossed whether or not they are used.
        padding: Pixels on each side, 0 or more.
        flip: Whether to mirror.

    Returns:
        New images of the same shape, type and device.

    Raises:
        DataError: ``images`` has not four axes, or ``padding`` is negative.
    """
    if images.ndim != 4 or padding < 0:
        raise DataError(
            f"Expected images of shape (n, C, H, W) and padding of 0 or more; got {tuple(images.shape)}, {padding}."
        )
    n, channels, height, width = images.shape

    def draw(below: int) -> Tensor:
        return torch.randint(below, (n, 1), generator=generator, device=generator.device).to(images.device)

    top, left, mirrored = draw(2 * padding + 1), draw(2 * padding + 1), draw(2).bool()
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(n, width)
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = left + columns
    where = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = pad(images, [padding] * 4).flatten(2)
    index = where.view(n, 1, height * width).expand(n, channels, -1)
    return padded.gather(2, index).view(n, channels, height, width)


def draw_coins(n: int, generator: torch.Generator) -> Tensor:
    """Toss a coin for each image, bool, shape (n,)."""
    return torch.randint(2, (n,), generator=generator, device=generator.device).bool()


def flipped(images: Tensor, coins: Tensor) -> Tensor:
    """Mirror the images whose coin is true, left to right."""
    return torch.where(coins.to(images.device)[:, None, None, None], images.flip(-1), images)


# Rotation -------------------------------------------------------------------------------------------------------------


def draw_angles(n: int, degrees: float, generator: torch.Generator) -> Tensor:
    """Draw an angle for each image, uniform in [-degrees, degrees], float64, shape (n,)."""
    return degrees * (2 * _uniform((n,), generator) - 1)


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Turn each image about its centre, counter-clockwise, by its own angle in degrees.

    torchvision's ``rotate`` with its defaults: the nearest pixel, black where there is none.
    """
    n, _, height, width = images.shape
    turn = torch.deg2rad(angles.to(images.device))
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    x = torch.linspace(-width / 2 + 0.5, width / 2 - 0.5, width, dtype=torch.float64, device=images.device)
    y = torch.linspace(-height / 2 + 0.5, height / 2 - 0.5, height, dtype=torch.float64, device=images.device)[:, None]
    # Where in the image each pixel of the result comes from, from -1 to 1 between its outer edges.
    where = torch.stack([(cos * x - sin * y) / (width / 2), (sin * x + cos * y) / (height / 2)], dim=-1)
    floats = images.to(torch.float32)
    turned = grid_sample(floats, where.float(), mode="nearest", padding_mode="zeros", align_corners=False)
    return turned.round().to(images.dtype).view(n, -1, height, width)


# Colour ---------------------------------------------------------------------------------------------------------------


def draw_jitter(n: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw factors and their order for each image.

    Returns:
        Factors of brightness, contrast and saturation, uniform in [max(0, 1 - strength), 1 + strength], float64, shape
        (n, 3); and the order in which they act, a permutation of 0, 1, 2 for each image, int64, shape (n, 3).
    """
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * _uniform((n, 3), generator)
    return factors, _uniform((n, 3), generator).argsort(1)


def jittered(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change each image's brightness, contrast and saturation, in its own order: torchvision's ``ColorJitter``.

        clamp(f x + (1 - f) y, 0, 255), cut to an integer

    where y is black for brightness, the grey image's mean for contrast, the grey image for saturation.

    Args:
        images: uint8, shape (n, 3, H, W).
        factors: As of :func:`draw_jitter`.
        order: As of :func:`draw_jitter`.

    Raises:
        DataError: The images have not three channels.
    """
    if images.shape[1] != 3:
        raise DataError(f"jitter is for images in colour, of 3 channels; these have {images.shape[1]}.")
    factors, order, images = factors.to(images.device, torch.float32), order.to(images.device), images.clone()
    for turn in range(3):
        for what in range(3):
            rows = (order[:, turn] == what).nonzero()[:, 0]
            part, factor = images[rows].float(), factors[rows, what].view(-1, 1, 1, 1)
            mixed = factor * part + (1 - factor) * _opposite(part, what)
            images[rows] = mixed.clamp(0, 255).to(images.dtype)
    return images


def _opposite(images: Tensor, what: int) -> Tensor:
    if what == 0:
        return torch.zeros_like(images[:, :1])
    # Summed in torchvision's order: a last bit decides which integer a grey level is cut to.
    grey = (GREY[0] * images[:, :1] + GREY[1] * images[:, 1:2] + GREY[2] * images[:, 2:]).trunc()
    return grey.mean((1, 2, 3), keepdim=True) if what == 1 else grey


# Random resized crop --------------------------------------------------------------------------------------------------


def draw_boxes(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw a part of each image: 8 to 100 % of its area, width over height between 3/4 and 4/3.

    torchvision's ``RandomResizedCrop`` with its defaults: the first of ten draws that lies inside the image; else the
    largest part in its middle whose sides fit.

    Returns:
        Top, left, height and width of each part, int64, shape (n, 4).
    """
    u = _uniform((4, TRIES, n), generator)
    area = height * width * (0.08 + 0.92 * u[0])
    ratio = torch.exp((2 * u[1] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)
    w, h, y, x = (t.gather(0, first)[0] for t in (w, h, u[2], u[3]))
    top, left = (y * (height - h + 1)).long(), (x * (width - w + 1)).long()
    middle_h = height if width / height >= 3 / 4 else round(width / (3 / 4))
    middle_w = width if width / height <= 4 / 3 else round(height * (4 / 3))
    middle = torch.tensor([(height - middle_h) // 2, (width - middle_w) // 2, middle_h, middle_w], device=w.device)
    return torch.where(fits.any(0)[:, None], torch.stack([top, left, h, w], dim=1), middle)


def resized(images: Tensor, boxes: Tensor) -> Tensor:
    """Draw a part of each image up to the image's size, bilinearly: torchvision's ``resized_crop``.

    Args:
        images: uint8, shape (n, C, H, W).
        boxes: Top, left, height and width of each part, int64, shape (n, 4).
    """
    top, left, height, width = boxes.to(images.device).unbind(1)
    floats = images.to(torch.float32)
    floats = _stretched(floats, top, height, dim=2)
    floats = _stretched(floats, left, width, dim=3)
    return floats.round().clamp(0, 255).to(images.dtype)


def _stretched(images: Tensor, start: Tensor, length: Tensor, dim: int) -> Tensor:
    """Draw the pixels from ``start`` on, ``length`` of them, up to the whole axis, for each image."""
    n, size = len(images), images.shape[dim]
    places = torch.arange(size, dtype=torch.float32, device=images.device) + 0.5
    where = (places * (length / size)[:, None] - 0.5).clamp(min=0)
    low = where.floor().long()
    share = where - low
    low = torch.minimum(low, length[:, None] - 1)
    high = torch.minimum(low + 1, length[:, None] - 1)
    shape = [n, 1, 1, 1]
    shape[dim] = size

    def take(index: Tensor) -> Tensor:
        return images.gather(dim, (start[:, None] + index).view(shape).expand_as(images))

    share = share.view(shape)
    return take(low) * (1 - share) + take(high) * share


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
