"""What a cohort computes in other ways than ``vmap`` would: the same numbers up to rounding, in fewer passes.

``vmap`` makes one convolution of K groups of K convolutions: of images whose channels are last in memory, position by
position all channels of all clients, PyTorch's grouped convolutions are about twice as fast on a CPU, and what goes
elementwise keeps that order (:func:`channels_last`). Pooling would not: ``vmap`` takes the clients for more images,
and copies. So :class:`StackedMaxPool` pools K times as many channels, and :class:`StackedConv` and
:class:`StackedLinear` add their bias where the product is made.

:func:`normalized` is batch normalization over the images of padded batches, with its gradient written out:

    w_i  = mask_i / n,    mean = sum_i w_i x_i,    c_i = x_i - mean,    var = sum_i w_i c_i^2
    y_i  = s c_i + bias,  s = weight / sqrt(var + eps)
    dx_i = s dy_i - w_i s sum_j dy_j - w_i c_i s / (var + eps) sum_j dy_j c_j
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.federation.cohort.torch_private import each, outside, together


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


class StackedConv(nn.Conv2d):
    """K convolutions as one of K times the groups, the bias included, in whatever order in memory the maps come."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, own = together(input, 1), together(weight, 0)
        shift = None if bias is None else together(bias, 0)
        plain = self.padding_mode == "zeros" and input.ndim == 4
        if x is None or own is None or (bias is not None and shift is None) or not plain:
            y: Tensor = super()._conv_forward(input, weight, bias)
            return y
        y = functional.conv2d(
            x.flatten(1, 2),
            own.flatten(0, 1),
            None if shift is None else shift.flatten(),
            self.stride,
            self.padding,
            self.dilation,
            self.groups * len(own),
        )
        return each(y.view(len(y), len(own), -1, *y.shape[2:]), 1)


class StackedLinear(nn.Linear):
    """K products of matrices as one batched product, which adds the bias too."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product."""
        x, own = together(input, 0), together(self.weight, 0)
        shift = None if self.bias is None else together(self.bias, 0)
        if x is None or own is None or (shift is None and self.bias is not None) or x.ndim < 3:
            return super().forward(input)
        with outside():
            y: Tensor = _Product.apply(x.flatten(1, -2), own, shift)
        return each(y.view(*x.shape[:-1], -1), 0)


class _Product(torch.autograd.Function):
    """x w^T + b for each client, whose gradient of w lies in memory as w does.

    PyTorch's own is the transpose of another product: the same bits, and whatever is done with it and with w, an update
    first of all, takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            torch.bmm(dy, weight) if of_x else None,
            torch.bmm(dy.mT, x) if of_weight else None,
            dy.sum(1) if of_bias else None,
        )


class StackedMaxPool(nn.MaxPool2d):
    """Max-pooling that does not mix the memory of the clients' maps up."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled maps."""
        x = together(input, -4) if input.ndim in (3, 4) else None  # (..., K, C, H, W)
        if x is None or self.return_indices:
            whole: Tensor = super().forward(input)
            return whole
        y = functional.max_pool2d(
            x.flatten(-4, -3), self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return each(y.view(*y.shape[:-3], *x.shape[-4:-2], *y.shape[-2:]), y.ndim - 3)


STACKED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: StackedConv,
    nn.Linear: StackedLinear,
    nn.MaxPool2d: StackedMaxPool,
}
"""Layers that compute in another way than ``vmap`` would: by the very type, its descendants may differ."""


def normalized(
    x: Tensor, mask: Tensor, n: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each client's padded batch by its images' moments.

    Args:
        x: Shape (B, K, C, ...).
        mask: 1 for an image and 0 for padding, float, shape (K, B).
        n: The number of values behind each moment, shape (K,).
        weight: Shape (K, C), or (1, C) where all have one, or None.
        bias: Likewise.
        eps: Is added to the variance.

    Returns:
        y, and the mean and the biased variance, shape (K, C), which no gradient comes from.
    """
    # A function with a gradient of its own may not be called within ``vmap``, and need not be: these are plain tensors.
    with outside():
        y, mean, var = _Norm.apply(x, mask, n, weight, bias, eps)
    return y, mean, var


def normalized_whole(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each client's batch, all rows of which are images: PyTorch's own batch normalization of K C channels.

    Args:
        x: Shape (B, K, C, ...).
        weight: Shape (K, C), or None.
        bias: Likewise.
        eps: Is added to the variance.

    Returns:
        As of :func:`normalized`.
    """
    clients, channels = x.shape[1:3]
    n = x[:, 0, 0].numel()
    mean, unbiased = (torch.zeros(clients * channels, dtype=x.dtype, device=x.device) for _ in range(2))
    scale, shift = (None if v is None else v.expand(clients, -1).reshape(-1) for v in (weight, bias))
    # Running moments of momentum 1 are the batch's own.
    y = functional.batch_norm(x.flatten(1, 2), mean, unbiased, scale, shift, True, 1.0, eps)
    var = unbiased * ((n - 1) / n)  # a new tensor: the backward pass looks at the other
    return y.view(x.shape), mean.view(clients, channels), var.view(clients, channels)


class _Norm(torch.autograd.Function):
    """:func:`normalized`, with its gradient."""

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


def _over_positions(x: Tensor) -> Tensor:
    """Return the sums over the positions of (B, K, C, ...), shape (B, K, C)."""
    return x.sum(tuple(range(3, x.ndim))) if x.ndim > 3 else x


def _as_maps(values: Tensor, x: Tensor) -> Tensor:
    """Return values of shape (K, C) or (B, K, C) to go with ``x``, shape (B, K, C, ...)."""
    return values.view(*values.shape, *[1] * (x.ndim - 3))
