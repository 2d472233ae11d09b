"""What methods that normalize each sample by itself have in common: there must be more than one number to normalize."""

from __future__ import annotations

from torch import Tensor, nn

from fednorm.errors import ConfigError, DataError


def require_features(method: str, num_channels: int, spatial_dims: int, *, over: str = "sample") -> None:
    """Require more than one number under each mean: a single one minus its mean is 0, whatever it was.

    Args:
        method: The method's name.
        num_channels: C.
        spatial_dims: Number of axes after C; more than 0 have positions, which count too.
        over: ``channels`` where each position is normalized by itself.

    Raises:
        ConfigError: There is one number.
    """
    if num_channels == 1 and (spatial_dims == 0 or over == "channels"):
        raise ConfigError(
            f"{method} over a single feature leaves nothing of it. Use 2 or more features "
            "there, or a method that normalizes over the batch, such as batch_norm."
        )


def require_numbers(name: str, x: Tensor) -> None:
    """Require more than one number in each sample.

    Raises:
        DataError: There is one.
    """
    if x.numel() == x.shape[0]:
        raise DataError(
            f"{name} meets an input of shape {tuple(x.shape)}, one number a sample: nothing is left of it. Use more "
            "channels or larger images there, or a method that normalizes over the batch, such as batch_norm."
        )


def require_channels(layer: nn.Module, num_channels: int, x: Tensor) -> None:
    """Require an input (N, C, ...).

    Raises:
        DataError: The input's shape is wrong.
    """
    if x.ndim < 2 or x.shape[1] != num_channels:
        name = type(layer).__name__
        raise DataError(f"{name} expects an input (N, {num_channels}, ...); got shape {tuple(x.shape)}.")


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the channels of (N, C, ...), shape (N, 1, ...).

    At x = 0 it is finite, and so is its gradient. ``F.rms_norm`` is the same number; PyTorch has a fused kernel of it
    for GPUs only, and on a CPU composes it of more passes than these.
    """
    return (x.square().mean(1, keepdim=True) + eps).rsqrt()
