"""What layers that estimate moments from a batch have in common: checks of the input, and the count of batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.errors import ConfigError, DataError
from fednorm.norms._precision import widened


class BatchLayer(_BatchNorm):
    """PyTorch's batch normalization for any number of spatial axes: learned (C,) scale and shift, running moments.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running moments. None averages all batches alike, as in PyTorch.
    """

    def __init__(self, num_features: int, *, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.weight: nn.Parameter
        self.bias: nn.Parameter
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, of its shape."""
        rows = as_rows(input)
        y: Tensor = super().forward(input if rows is None else rows)
        return y if rows is None else from_rows(y, input)

    def _check_input_dim(self, input: Tensor) -> None:
        """Require (N, C, ...) and, in training, more than one value per channel.

        Raises:
            DataError: The input is something else.
        """
        name, shape = type(self).__name__, tuple(input.shape)
        if input.ndim < 2 or shape[1] != self.num_features:
            raise DataError(f"{name} expects an input (N, {self.num_features}, ...); got shape {shape}.")
        if self.training and input.numel() <= self.num_features:
            raise DataError(
                f"{name} estimates a variance from each batch and needs more than one value per channel; got shape "
                f"{shape}. Use a batch size of at least 2, drop the last batch, or call model.eval()."
            )

    @torch.no_grad()
    def count_batch(self) -> float:
        """Count a batch, and return its weight in the running moments."""
        self.num_batches_tracked.add_(1)
        return 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, rate: float) -> None:
        """Move the running moments towards a batch's: running <- (1 - rate) * running + rate * batch."""
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            if running.dtype == batch.dtype:
                running.lerp_(batch, rate)
            else:  # a model in half precision
                running.copy_(widened(running).lerp(batch, rate))


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return values of shape (C,) or (N, C) as (1, C, 1, ...) or (N, C, 1, ...), to go with ``like`` (N, C, ...)."""
    return values.view(-1, like.shape[1], *[1] * (like.ndim - 2))


def as_rows(x: Tensor) -> Tensor | None:
    """Return a transformer's tokens, seen with their features first, as the rows (N L, C) that they are in memory.

    PyTorch's batch normalization takes ten times as long for (N, C, L) whose features stand side by side, with the
    same numbers but for rounding. (Maps (N, C, L, 1) would be as fast, but there its backward pass takes a gradient of
    another layout for one of the input's, in torch 2.14, and is wrong.)

    Returns:
        None for all else.
    """
    if x.ndim == 3 and x.shape[1] > 1 and x.transpose(1, 2).is_contiguous() and not x.is_contiguous():
        return x.transpose(1, 2).reshape(-1, x.shape[1])
    return None


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows as tokens of the shape and layout of ``like``, (N, C, L)."""
    return rows.view(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2)


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return ``torch.nn.functional.batch_norm``, of tokens by its kernel for rows (:func:`as_rows`)."""
    rows = as_rows(x)
    given = x if rows is None else rows
    y = functional.batch_norm(given, mean, var, weight, bias, training, momentum, eps)
    return y if rows is None else from_rows(y, x)


def check_spatial_dims(method: str, spatial_dims: int) -> None:
    """Require 0 to 3 spatial axes.

    Raises:
        ConfigError: It is another number.
    """
    if spatial_dims not in (0, 1, 2, 3):
        raise ConfigError(f"{method} is defined for 0 to 3 spatial axes; got {spatial_dims}.")


@torch.no_grad()
def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a batch's mean and biased variance per channel, by PyTorch's fused kernel; two or more values each."""
    mean, var = x.new_zeros(2, x.shape[1])
    batch_norm(x, mean, var, training=True, momentum=1.0)  # 3 to 6 times as fast as torch.var_mean
    count = x.numel() / x.shape[1]
    return mean, var.mul_((count - 1) / count)


def scaled_by(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias for given moments, by PyTorch's fused kernel."""
    return batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


def scaled_by_backward(
    gy: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`scaled_by` with the moments as constants: of x, of weight and of bias."""
    rows = as_rows(x)
    given, gradient = (x, gy) if rows is None else (rows, gy.transpose(1, 2).reshape(rows.shape))
    of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        gradient, given, weight, mean, var, None, None, False, eps, [True, True, True]
    )
    return of_x if rows is None else from_rows(of_x, x), of_weight, of_bias
