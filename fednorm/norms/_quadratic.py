"""What layers that divide by a quadratic mean of the batch, and subtract nothing, have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fednorm.errors import DataError
from fednorm.norms._batch import scaled_by
from fednorm.norms._precision import in_full_precision, widened


class QuadraticLayer(nn.Module):
    """A layer for (N, C) and (N, C, ...) whose tokens are all samples at all positions.

    Evaluation divides by the root of the running quadratic mean: y = x / sqrt(running + eps) * weight + bias.

    Args:
        num_features: C.
        eps: Added to the quadratic mean.
        momentum: Weight of the new batch in the running quadratic mean. None averages all batches alike, as in
            PyTorch's batch normalization, and normalizes each by itself: how statistics are estimated anew.

    Attributes:
        running: Name of the buffer that holds the running quadratic mean.
    """

    running: ClassVar[str]

    def __init__(self, num_features: int, *, eps: float, momentum: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum: float | None = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.ema_gz: Tensor
        self.iters: Tensor
        self.register_buffer(self.running, torch.ones(num_features))
        self.register_buffer("ema_gz", torch.zeros(num_features))
        self.register_buffer("iters", torch.zeros((), dtype=torch.long))

    @property
    def running_mean(self) -> Tensor:
        """What is subtracted: zeros, (C,)."""
        return torch.zeros_like(self.weight.detach())

    def reset_running_stats(self) -> None:
        """Return all that was estimated to its start."""
        getattr(self, self.running).fill_(1)
        self.ema_gz.zero_()
        self.iters.zero_()

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates what is estimated.

        Args:
            x: (N, C) or (N, C, ...).
            pad_mask: True for what is padding and enters no statistic, boolean, (N, ...) without C; None for nothing.

        Raises:
            DataError: A shape is wrong, or in training there is one value per channel.
        """
        self._check(x, pad_mask)
        return self._normalized(x, pad_mask)

    @in_full_precision
    def _normalized(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        x = self._scaled(x)
        if self.training:
            return self._train(x, self._square(x, pad_mask))
        square = widened(getattr(self, self.running))
        return scaled_by(x, torch.zeros_like(square), square, widened(self.weight), widened(self.bias), self.eps)

    def _scaled(self, x: Tensor) -> Tensor:
        """Return what comes before the division by the batch's quadratic mean; nothing unless overridden."""
        return x

    def _train(self, x: Tensor, square: Tensor) -> Tensor:
        """Return a training batch, whose quadratic mean is ``square``, normalized."""
        raise NotImplementedError

    @torch.no_grad()
    def _square(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        """Return the batch's quadratic mean, (C,)."""
        axes = axes_of(x)
        if pad_mask is None:
            return x.square().mean(axes)
        counted = ~pad_mask.unsqueeze(1)
        return (x.square() * counted).sum(axes) / counted.sum().clamp_min(1)

    def _check(self, x: Tensor, pad_mask: Tensor | None) -> None:
        name, shape = type(self).__name__, tuple(x.shape)
        if x.ndim < 2 or shape[1] != self.num_features:
            raise DataError(f"{name} expects an input (N, {self.num_features}, ...); got shape {shape}.")
        if self.training and x.numel() <= self.num_features:
            raise DataError(
                f"{name} estimates a mean square from each batch and needs more than one value per channel: of one, "
                f"only its sign would be left; got shape {shape}. Use a batch size of at least 2, drop the last batch, "
                "or call model.eval()."
            )
        if pad_mask is not None and (pad_mask.dtype, tuple(pad_mask.shape)) != (torch.bool, (shape[0], *shape[2:])):
            raise DataError(
                f"{name} expects a boolean pad_mask of shape {(shape[0], *shape[2:])} for an input of shape {shape}, "
                f"True for padding; got {pad_mask.dtype} of shape {tuple(pad_mask.shape)}."
            )


def axes_of(x: Tensor) -> tuple[int, ...]:
    """Return the axes of (N, C, ...) over which a statistic per channel is taken."""
    return (0, *range(2, x.ndim))
