"""PowerNorm: batch normalization without centring, by a running quadratic mean, with an approximate backward pass.

Shen, Yao, Gholami, Mahoney, Keutzer. PowerNorm: Rethinking Batch Normalization in Transformers. ICML 2020.
https://arxiv.org/abs/2003.07845. Official code: sIncerass/powernorm, fairseq/modules/norms/mask_powernorm.py.

    u   = x / sqrt(mean of x^2 over the channels of a group, at one position of one sample, + 1e-5)
    q   = mean of u^2 over samples and positions, per channel;                    t = 1, 2, ... counts training batches
    z   = u / sqrt(q + eps)          for t <= warmup_iters
          u / sqrt(phi + eps)        afterwards, phi from before this batch
    y   = weight z + bias
    phi <- phi (t - 1) / t + q / t                                                for t < warmup_iters, and then always
    phi <- alpha_fwd phi + (1 - alpha_fwd) q
    evaluation: y = weight u / sqrt(phi + eps) + bias

The backward pass is *not* the gradient of this (a gradient check fails, by design):

    g = dy weight;   a = g - (1 - alpha_bkw) nu z;   du = a / sqrt(q + eps);   nu <- nu + mean of a z

nu is ``ema_gz``. It divides by the present batch's q, also after the warm-up; the paper divides by what the forward
pass divided by (``backward_scale="running"``). The group scaling has its true gradient.

A layer for maps takes each position of each sample for a token. ``forward`` takes a ``pad_mask`` for tokens.

Federated: FedAvg averages phi, which is exact for a quadratic mean; nu begins at 0 every round; every client counts its
own batches. Continual: phi and t are kept, nu is stale at a boundary and declared to be reset.
Differs: phi has shape (C,), the official buffer (1, C, 1, 1). A batch of one value per channel is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._batch import check_spatial_dims, per_channel, scaled_by, scaled_by_backward
from fednorm.norms._compile import uncompiled
from fednorm.norms._features import require_features
from fednorm.norms._precision import widened
from fednorm.norms._quadratic import QuadraticLayer, axes_of
from fednorm.norms.group_norm import checked_groups
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

GROUP_EPS = 1e-5
"""Added to the mean square of a group; fixed in the official code."""


class _GroupScaling(torch.autograd.Function):
    """x / sqrt(mean of x^2 + GROUP_EPS) over axis 2, with its true gradient, in fewer passes than autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return u."""
        scale = (x.square().mean(2, keepdim=True) + GROUP_EPS).rsqrt_()
        u = x * scale
        ctx.save_for_backward(u, scale)
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gu: Tensor) -> Tensor:
        """Return (gu - u mean of (gu u)) scale."""
        u, scale = ctx.saved_tensors
        along = (gu * u).mean(2, keepdim=True)
        return torch.addcmul(gu, u, along, value=-1).mul_(scale)


class _Power(torch.autograd.Function):
    """The normalization with the published backward pass, which moves nu."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        squares: tuple[Tensor, Tensor],
        ema_gz: Tensor,
        settings: tuple[float, float],
    ) -> Tensor:
        """Normalize.

        Args:
            ctx: For the backward pass.
            u: The group-scaled input.
            weight: The scale.
            bias: The shift.
            squares: What the forward pass and what the backward pass divide by the roots of, (C,).
            ema_gz: nu itself, which the backward pass moves.
            settings: eps and alpha_bkw.
        """
        ctx.save_for_backward(u, weight, *squares)
        ctx.ema_gz, ctx.settings = ema_gz, settings
        return scaled_by(u, torch.zeros_like(squares[0]), squares[0], weight, bias, settings[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the approximate gradient of u, and the true ones of weight and bias."""
        u, weight, square, below = ctx.saved_tensors
        (eps, alpha), nu = ctx.settings, widened(ctx.ema_gz)
        inverse, factor = (square + eps).rsqrt(), ((square + eps) / (below + eps)).sqrt()
        gu, gw, gb = scaled_by_backward(gy, u, torch.zeros_like(square), square, weight * factor, eps)
        held = (1 - alpha) * nu
        # gw is the sum of dy z, padding included; so is the mean of z^2.
        z_square = u.square().mean(axes_of(u)) * inverse.square()
        ctx.ema_gz.copy_(nu + weight * gw / (u.numel() / len(weight)) - held * z_square)
        away = held * inverse * (below + eps).rsqrt()
        return torch.addcmul(gu, u, per_channel(away, u), value=-1), gw, gb, None, None, None


class PowerNormLayer(QuadraticLayer):
    """PowerNorm for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        num_groups: Groups of the group scaling; it divides C.
        alpha_fwd: Share of the old value that phi keeps.
        alpha_bkw: The same for nu.
        warmup_iters: Batches that are normalized by their own quadratic mean.
        backward_scale: ``batch`` or ``running``: what the backward pass divides by.
        eps: Added to the quadratic mean.
    """

    running = "running_phi"

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int,
        alpha_fwd: float,
        alpha_bkw: float,
        warmup_iters: int,
        backward_scale: str,
        eps: float,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=1 - alpha_fwd)
        self.running_phi: Tensor
        self.num_groups = num_groups
        self.alpha_bkw = alpha_bkw
        self.warmup_iters = warmup_iters
        self.backward_scale = backward_scale

    @property
    def running_var(self) -> Tensor:
        """The running quadratic mean: the second moment around the mean of 0 that is subtracted, (C,)."""
        return self.running_phi

    def group_scaled(self, x: Tensor) -> Tensor:
        """Return ``x`` divided by the root mean square of each group of channels at each position."""
        groups: Tensor = x.unflatten(1, (self.num_groups, -1))  # type: ignore[no-untyped-call]
        scaled: Tensor = _GroupScaling.apply(groups)
        return scaled.flatten(1, 2)

    def _scaled(self, x: Tensor) -> Tensor:
        return self.group_scaled(x)

    @uncompiled
    def _train(self, x: Tensor, square: Tensor) -> Tensor:
        of_forward = self._track(square)
        squares = of_forward, square if self.backward_scale == "batch" else of_forward
        weight, bias = widened(self.weight), widened(self.bias)
        y: Tensor = _Power.apply(x, weight, bias, squares, self.ema_gz, (self.eps, self.alpha_bkw))
        return y

    @torch.no_grad()
    def _track(self, square: Tensor) -> Tensor:
        """Count a batch and move phi; return what the forward pass divides by.

        All of it is arithmetic of tensors: no number is read back from an accelerator.
        """
        t, phi = self.iters.add_(1), widened(self.running_phi)
        cumulative = phi * (t - 1) / t + square / t
        if self.momentum is None:
            self.running_phi.copy_(cumulative)
            return square
        divisor = torch.where(t <= self.warmup_iters, square, phi)
        self.running_phi.copy_(torch.where(t < self.warmup_iters, cumulative, phi).lerp(square, self.momentum))
        return divisor

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f"{self.num_features}, eps={self.eps:g}, num_groups={self.num_groups}, warmup_iters={self.warmup_iters}, "
            f"alpha_bkw={self.alpha_bkw:g}, backward_scale={self.backward_scale}"
        )


@dataclass(frozen=True, kw_only=True)
class PowerNorm(Norm):
    """PowerNorm and its options.

    Attributes:
        num_groups: Groups of the group scaling; it must divide the number of channels of every layer.
        alpha_fwd: Share of the old value that the running quadratic mean keeps, in (0, 1).
        alpha_bkw: Share of the old value that the running gradient statistic keeps, in (0, 1).
        warmup_iters: Training batches that are normalized by their own quadratic mean, 0 or more. The official default
            is longer than most federated runs; set it to a part of a client's updates.
        backward_scale: ``batch`` (the official code) or ``running`` (the paper).
        eps: Added to the quadratic mean, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    num_groups: int = 1
    alpha_fwd: float = 0.9
    alpha_bkw: float = 0.9
    warmup_iters: int = 10000
    backward_scale: str = "batch"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.whole("power_norm", "num_groups", self.num_groups, at_least=1)
        for name in ("alpha_fwd", "alpha_bkw"):
            options.number("power_norm", name, getattr(self, name), above=0)
            if not getattr(self, name) < 1:
                raise ConfigError(
                    f"power_norm.{name} is the share of the old value that is kept, between 0 and 1; got "
                    f"{getattr(self, name)!r}."
                )
        options.whole("power_norm", "warmup_iters", self.warmup_iters, at_least=0)
        options.one_of("power_norm", "backward_scale", self.backward_scale, ("batch", "running"))
        options.number("power_norm", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``num_groups`` does not divide ``num_channels``, a group would be a single channel, or
                ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("power_norm", spatial_dims)
        require_features("power_norm", num_channels, spatial_dims, over="channels")
        # A group is one position's, so a group of one channel is a single number whatever the number of positions.
        groups = checked_groups(num_channels, self.num_groups, 0)
        return PowerNormLayer(
            num_channels,
            num_groups=groups,
            alpha_fwd=self.alpha_fwd,
            alpha_bkw=self.alpha_bkw,
            warmup_iters=self.warmup_iters,
            backward_scale=self.backward_scale,
            eps=self.eps,
        )


SPEC = NormSpec(
    name="power_norm",
    summary="y = u / sqrt(running mean of u^2 + eps) * weight + bias, u scaled by group; an approximate backward pass.",
    citation=Citation(
        title="PowerNorm: Rethinking Batch Normalization in Transformers",
        authors="Shen, Yao, Gholami, Mahoney, Keutzer",
        year=2020,
        arxiv="2003.07845",
        where="Algorithms 2 and 3; official code sIncerass/powernorm, mask_powernorm.py",
    ),
    make=PowerNorm,
    exact_backward=False,
    layers=(PowerNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_phi": TensorSpec(Kind.QUADRATIC),
        "ema_gz": TensorSpec(Kind.GRAD_STAT, Carry.RESET),
        "iters": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "The backward pass is an approximation, as published: it is not the gradient of the forward pass.",
        "By default it divides by the batch's quadratic mean, as the official code; the paper's divides by the running "
        "one (backward_scale).",
        "Each position of a feature map is a token; the paper's tokens are words.",
        "One group by default, the official class's; its configurations have as many as there are heads.",
        "A batch with one value per channel, of which the division would leave the sign, is refused in training.",
        "Costs 3 to 4 times nn.BatchNorm2d on a CPU at a batch of 32: the group scaling passes over its input as often "
        "again, and no fused kernel does it.",
    ),
    verified=(
        "golden trace powernorm of sIncerass/powernorm: outputs, gradients and buffers through warm-up, with padding.",
        "its formula in float64; a gradient check fails, as it must.",
    ),
)
