"""What a cohort computes in other ways than ``vmap`` would: the same numbers up to rounding, in fewer passes.

``vmap`` makes one convolution of K groups of K convolutions: of images whose channels are last in memory, position by
position all channels of all clients, PyTorch's grouped convolutions are about twice as fast on a CPU, and what goes
elementwise keeps that order (:func:`channels_last`). Pooling would not: ``vmap`` takes the clients for more images,
and copies. So :class:`Pooled` pools K times as many channels.

:class:`Normalized` is batch normalization over the images of padded batches, with its gradient written out:

    w_i  = mask_i / n,    mean = sum_i w_i x_i,    c_i = x_i - mean,    var = sum_i w_i c_i^2
    y_i  = s c_i + bias,  s = weight / sqrt(var + eps)
    dx_i = s dy_i - w_i s sum_j dy_j - w_i c_i s / (var + eps) sum_j dy_j c_j
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Dims = Sequence[int | None]


def channels_last(images: Tensor) -> Tensor:
    """Return images of K clients with their channels last in memory, and the clients before these.

    Args:
        images: Shape (K, B, C, H, W).

    Returns:
        The same values in the same shape; the images themselves on another device than a CPU.
    """
    if not images.is_cpu:
        return images
    last: Tensor = images.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)
    return last


class Pooled(torch.autograd.Function):
    """Max-pooling of each of several clients' maps; see :func:`torch.nn.functional.max_pool2d`."""

    @staticmethod
    def forward(x: Tensor, options: tuple[Any, ...]) -> Tensor:
        """Pool one client's maps."""
        pooled: Tensor = functional.max_pool2d(x, *options)
        return pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Do nothing: it is always computed for several clients."""

    @staticmethod
    def vmap(info: Any, in_dims: Dims, x: Tensor, options: tuple[Any, ...]) -> tuple[Tensor, int]:
        """Pool the maps of several clients."""
        del info
        assert in_dims[0] is not None, "the images are a client's own"
        maps = x.movedim(in_dims[0], -4)  # (..., K, C, H, W)
        pooled = functional.max_pool2d(maps.flatten(-4, -3), *options)
        return pooled.unflatten(-3, maps.shape[-4:-2]), x.ndim - 4


class Normalized(torch.autograd.Function):
    """Batch normalization of each of several clients' padded batches.

    Its arguments are ``x``, shape (B, C, ...), the mask, shape (B,), the number of values behind each moment, a
    scalar, the weight and the bias, shape (C,) or None, and eps. It returns y, and the mean and the biased variance,
    shape (C,), which no gradient comes from.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize one client's batch."""
        x, mask, n, weight, bias, eps = inputs
        one = (None if v is None else v[None] for v in (mask, n, weight, bias))
        y, mean, var = _Norm.apply(x[:, None], *one, eps)
        return y[:, 0], mean[0], var[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Do nothing: it is always computed for several clients."""

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        """Normalize the batches of several clients."""
        del info
        x, mask, n, weight, bias, eps = inputs
        x = x.movedim(in_dims[0], 1)
        rest = (_in_front(v, dim) for v, dim in zip((mask, n, weight, bias), in_dims[1:5], strict=True))
        return _Norm.apply(x, *rest, eps), (1, 0, 0)


class _Norm(torch.autograd.Function):
    """:class:`Normalized` with the clients' axis in place: x of shape (B, K, C, ...), all else with K in front."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, mask, n, weight, bias, eps = inputs
        share = (mask / n[:, None]).T[..., None]  # (B, K, 1)
        mean = (_over_positions(x) * share).sum(0)
        centred = x - _as_maps(mean, x)
        var = (_over_positions(centred.square()) * share).sum(0)
        root = (var + eps).rsqrt()
        scale = _as_maps(root if weight is None else root * weight, x)
        y = centred * scale if bias is None else torch.addcmul(_as_maps(bias, x), centred, scale)
        ctx.save_for_backward(centred, share, root, weight)
        ctx.biased = bias is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        dy, (centred, share, root, weight) = grads[0], ctx.saved_tensors
        scale = root if weight is None else root * weight
        total = _over_positions(dy).sum(0)
        with_centred = _over_positions(dy * centred).sum(0)
        dx = None
        if ctx.needs_input_grad[0]:
            through_var = share * (scale * root.square() * with_centred)  # (B, K, C)
            dx = dy * _as_maps(scale, dy)
            dx.addcmul_(centred, _as_maps(through_var, dy), value=-1)
            dx.sub_(_as_maps(share * (scale * total), dy))
        dweight = None if weight is None else with_centred * root
        return dx, None, None, dweight, total if ctx.biased else None, None


def _in_front(value: Tensor | None, dim: int | None) -> Tensor | None:
    if value is None:
        return None
    return value[None] if dim is None else value.movedim(dim, 0)


def _over_positions(x: Tensor) -> Tensor:
    """Return the sums over the positions of (B, K, C, ...), shape (B, K, C)."""
    return x.sum(tuple(range(3, x.ndim))) if x.ndim > 3 else x


def _as_maps(values: Tensor, x: Tensor) -> Tensor:
    """Return values of shape (K, C) or (B, K, C) to go with ``x``, shape (B, K, C, ...)."""
    return values.view(*values.shape, *[1] * (x.ndim - 3))
