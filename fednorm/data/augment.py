"""Random crop and flip, drawn for each image of a batch, without a loop over images.

For uint8 images: the border is 0, which is black, as torchvision's ``RandomCrop(padding=4)`` has it before the pixels
are normalized.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fednorm.data.domain import pixels
from fednorm.errors import DataError


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


def prepared(images: Tensor, augment: str, generator: torch.Generator) -> Tensor:
    """Return pixels augmented, as floats for the network; what came ready for it as it came.

    Args:
        images: uint8, shape (n, C, H, W); floats are returned as they are.
        augment: ``none``, ``crop`` or ``crop_flip``.
        generator: Drawn from by the augmentation alone.
    """
    if images.dtype != torch.uint8:
        return images
    if augment != "none":
        images = crop_and_flip(images, generator, flip=augment == "crop_flip")
    return pixels(images)
