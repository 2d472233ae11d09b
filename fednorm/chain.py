"""Networks whose layers run one after the other, for images of one size."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from fednorm.errors import DataError


class Chain(nn.Sequential):
    """Layers that run in their order, after a look at the shape of the images (N, 3, S, S).

    Args:
        layers: The layers, by name.
        image_size: S.
    """

    name: ClassVar[str]
    """The model's name, for messages."""

    def __init__(self, layers: OrderedDict[str, nn.Module], image_size: int) -> None:
        super().__init__(layers)
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits.

        Raises:
            DataError: The images are not of shape (N, 3, image_size, image_size).
        """
        require_images(self.name, images, self.image_size)
        hidden = images
        for layer in self:
            hidden = layer(hidden)
        return hidden


def in_order(module: nn.Module) -> bool:
    """Return whether a module runs its children one after the other, in the order of their registration.

    A subclass of ``nn.Sequential`` with a forward pass of its own may do something else.
    """
    return isinstance(module, nn.Sequential) and type(module).forward in (nn.Sequential.forward, Chain.forward)


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
