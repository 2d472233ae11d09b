"""A layer over axis 1 where a network has its channels last, as transformers do."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """Applies a layer for (N, C) and (N, C, L) to an input whose channels are last: (N, C) or (N, ..., C).

    Args:
        layer: The layer.
        batch_axis: 1 for inputs (L, N, C), as transformers without ``batch_first`` have them.
    """

    def __init__(self, layer: nn.Module, batch_axis: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.batch_axis = batch_axis

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        if x.ndim == 2:
            features: Tensor = self.layer(x)
            return features
        moved = x.movedim(self.batch_axis, 0)
        flat: Tensor = self.layer(moved.flatten(1, -2).transpose(1, 2))
        return flat.transpose(1, 2).reshape(moved.shape).movedim(0, self.batch_axis)

    def extra_repr(self) -> str:
        """Return the batch's axis where it is not the first."""
        return f"batch_axis={self.batch_axis}" if self.batch_axis else ""
