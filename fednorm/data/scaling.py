"""From 8-bit pixels to what a network is given: ``(x / 255 - mean) / std``, by channel.

Which mean and std is ``data.normalize``'s choice; :mod:`fednorm.data.normalize` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fednorm.errors import DataError
from fednorm.scalar import scalar


@dataclass(frozen=True)
class Scaling:
    """Maps uint8 images to float32, by one mean and std a channel, or by those of the group each image belongs to.

        (x / 255 - mean) / std  =  x / (255 std) - mean / std

    Attributes:
        mean: Of each group (G), of each channel (C, or 1 for all), in units of the whole range, 255.
        std: Likewise, greater than 0.
    """

    mean: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]

    @classmethod
    def stack(cls, scalings: Iterable[Scaling]) -> Self:
        """Return one scaling whose group k is the k-th of those given; just the one where all are the same."""
        each = list(scalings)
        each = each[:1] if len(set(each)) == 1 else each
        return cls(tuple(m for s in each for m in s.mean), tuple(d for s in each for d in s.std))

    def __call__(self, images: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return what the network is given of images, laid out channels-last, in which CPUs convolve faster.

        Args:
            images: uint8, shape (n, C, H, W); of any other type they count as ready for the network and are returned.
            groups: The group of each image, int64, shape (n,); not needed where there is one.

        Raises:
            DataError: There are other channels than the scaling has, or several groups and none is named.
        """
        if images.dtype != torch.uint8:
            return images
        floats = images.to(torch.float32, memory_format=torch.channels_last)
        if len(self.mean) == 1 and len(self.mean[0]) == 1:
            centre, spread = self.mean[0][0], self.std[0][0]
            return floats.div_(scalar(255 * spread, floats)).sub_(scalar(centre / spread, floats))
        if len(self.mean) > 1 and groups is None:
            raise DataError(
                f"The images of {len(self.mean)} domains are scaled each in its own way: name their groups."
            )
        mean, std = (self._rows(values, groups, images) for values in (self.mean, self.std))
        return floats.div_((255 * std).float()).sub_((mean / std).float())

    def _rows(self, values: Sequence[Sequence[float]], groups: Tensor | None, images: Tensor) -> Tensor:
        """Return the values that each image is scaled by, float64, shape (n or 1, C or 1, 1, 1)."""
        if len(values[0]) not in (1, images.shape[1]):
            raise DataError(f"The images have {images.shape[1]} channels, and were measured with {len(values[0])}.")
        table = torch.tensor(values, dtype=torch.float64, device=images.device)
        if groups is not None and len(values) > 1:
            table = table[groups.to(images.device)]
        return table[:, :, None, None]


HALF = Scaling(((0.5,),), ((0.5,),))
"""``x / 127.5 - 1``, in [-1, 1]: mean 0.5 and std 0.5, as in FedBN's protocol on digits."""

UNIT = Scaling(((0.0,),), ((1.0,),))
"""``x / 255``, in [0, 1], as torchvision's ``ToTensor``."""
