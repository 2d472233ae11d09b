"""The rows of a convolution's weight, one an output channel, without mean and of a common length.

Two forms of one formula. :func:`centre` composes it of operations, for wherever these are transformed or compiled, or
the weight is not on the CPU. :func:`normalized_rows` has PyTorch's batch normalization do it, to which a weight is a
batch of one image whose channels are the outputs: a few calls instead of two dozen, forward and backward, which is a
third of the time, for small weights and for large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fednorm.norms._transforms import transforms_active
from fednorm.scalar import scalar

_TINY = 1e-30
"""Added to a variance that nothing is added to: less than any that counts, and PyTorch divides by no zero."""


def centre(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row of a convolution's weight minus its mean, and the row's length.

    Differentiable; a row of length 0 gets the gradient 0. Several times faster than ``torch.var_mean`` on a CPU.
    var * N is the squared length.

    Args:
        weight: Shape (C_out, C_in / groups, k_h, k_w).

    Returns:
        The centred rows, shape (C_out, N), and their Euclidean lengths, shape (C_out, 1).
    """
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return centred, torch.linalg.vector_norm(centred, dim=1, keepdim=True)


def composes(weight: Tensor) -> bool:
    """Return whether a weight's rows are to be normalized by composed operations."""
    return weight.device.type != "cpu" or torch.compiler.is_compiling() or transforms_active()


def normalized_rows(
    weight: Tensor, gain: Tensor | None, factor: float, *, eps: float = 0.0, least: float = 0.0
) -> Tensor | None:
    """Return factor * gain * (w - mean) / sqrt(var + eps), row by row, with the biased variance; differentiable.

    Args:
        weight: Shape (C_out, C_in / groups, k_h, k_w), on the CPU, of single or double precision.
        gain: C_out numbers in any shape; 1 if None.
        factor: Of every row.
        eps: Added to the variance.
        least: The least variance that there may be.

    Returns:
        A tensor that looks like the weight, and lies in memory as it does; None where a row's variance is below
        ``least``.
    """
    channels = len(weight)
    last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    laid_out = weight.permute(0, 2, 3, 1) if last else weight
    scale = weight.new_full((channels,), factor) if gain is None else gain.reshape(channels) * scalar(factor, gain)
    rows = laid_out.reshape(1, channels, -1)
    y, _, inverse = torch.native_batch_norm(rows, scale, None, None, None, True, 0.0, eps or _TINY)
    if least and float(inverse.max()) > least**-0.5:
        return None
    shaped: Tensor = y.view(laid_out.shape)
    return shaped.permute(0, 3, 1, 2) if last else shaped
