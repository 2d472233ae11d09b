"""Unified normalization: geometric means of recent quadratic means, a filter of outliers, an approximate backward pass.

Yang, Yuan, Ding, Hao, Ma, Gao, Wang. Unified Normalization for Accelerating and Stabilizing Transformers. ACM MM 2022.
https://arxiv.org/abs/2208.01313. Official code: hikvision-research/Unified-Normalization, unified_normalization.py.

    q   = mean of x^2 over samples and positions, per channel;                    t = 1, 2, ... counts training batches
    outlier: t >= warmup_iters, and for any channel  arithmetic - geometric mean of the window, q in it,
             > window * variance of the roots of the window before q came into it
    window[t mod M] <- q;   running_var of before where q is an outlier
    var = q                                for t <= M, t < warmup_iters, an outlier, or M = 1
          geometric mean of the window     else
    z   = x / sqrt(var + eps);   y = weight z + bias
    running_var <- (1 - momentum) running_var + momentum var
    evaluation: y = weight x / sqrt(running_var + eps) + bias

The backward pass is *not* the gradient of this but for M = 1, where it is:

    r   = sqrt(var + eps) / sqrt(running_var of before + eps), within [1/5, 5];   1 for t <= max(1000, warmup_iters)
    g   = dy weight r;   gz = mean of g z;   m = gz where var = q, else the mean of the last M' of them
    ema_gz <- (1 - momentum) ema_gz + momentum m;   dx = (g - ema_gz z) / sqrt(var + eps);   dweight = sum of dy r z
    an outlier, or M = 1: r = 1, and m in place of ema_gz in dx

**Before the window is full** evaluation is what the official code makes it: the running quadratic mean, which begins at
1, whatever the window holds. A network that was never trained is evaluated as it stands.

Federated: FedAvg averages running_var, which is exact for a quadratic mean; the windows and ema_gz are a client's own
and begin anew every round, while the counter goes on. A row of the window that is empty stands for running_var: the
official code would take the geometric mean of a zero, and divide by sqrt(eps).
Continual: at a boundary the windows, ema_gz and the counter are declared to be reset, which the authors advise for
fine-tuning; running_var is kept, and skip_counter, which counts outliers, shows where the data changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import check_spatial_dims, per_channel, scaled_by, scaled_by_backward
from fednorm.norms._compile import uncompiled
from fednorm.norms._precision import widened
from fednorm.norms._quadratic import QuadraticLayer
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

LARGEST_RATIO = 5.0
"""Bound of r, and the inverse of its lower bound; fixed in the official code."""

WITHOUT_RATIO = 1000
"""Batches for which r is 1 at least; fixed in the official code."""


class _Batch(NamedTuple):
    """What a training batch is normalized by, and what its backward pass needs to know.

    Attributes:
        var: What the batch is divided by the root of, (C,).
        ratio: r, (C,).
        skipped: Whether the batch is normalized by itself as an outlier or because M is 1; boolean, ().
        by_itself: Whether gz stands for itself: early, or skipped; boolean, ().
        row: Row of the window of gradients, (1,).
    """

    var: Tensor
    ratio: Tensor
    skipped: Tensor
    by_itself: Tensor
    row: Tensor


class _Unified(torch.autograd.Function):
    """The normalization with the published backward pass, which moves ema_gz and its window."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor],
        settings: tuple[float, float],
        *batch: Tensor,
    ) -> Tensor:
        """Divide by the root of ``batch``'s var.

        Args:
            ctx: For the backward pass.
            x: The input.
            weight: The scale.
            bias: The shift.
            running: The window of gradients and ema_gz themselves, which the backward pass moves.
            settings: eps, and the weight of the new batch in ema_gz.
            *batch: The fields of :class:`_Batch`.
        """
        ctx.save_for_backward(x, weight, *batch)
        ctx.running, ctx.settings = running, settings
        var = batch[0]
        return scaled_by(x, torch.zeros_like(var), var, weight, bias, settings[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the approximate gradients of x and weight, and the true one of bias."""
        x, weight, var, ratio, skipped, by_itself, row = ctx.saved_tensors
        (window, ema_gz), (eps, rate) = ctx.running, ctx.settings
        gx, gw, gb = scaled_by_backward(gy, x, torch.zeros_like(var), var, weight * ratio, eps)
        gz, ema = weight * ratio * gw / (x.numel() / len(weight)), widened(ema_gz)  # gw is the sum of dy z
        window.index_copy_(0, row, torch.where(skipped, ema, gz).to(window.dtype)[None])
        mean = torch.where(by_itself, gz, widened(window).mean(0))
        moved = ema.lerp(mean, rate)
        ema_gz.copy_(moved)
        away = torch.where(skipped, mean, moved) / (var + eps)
        return torch.addcmul(gx, x, per_channel(away, x), value=-1), gw * ratio, gb, *[None] * 7


class UnifiedNormLayer(QuadraticLayer):
    """Unified normalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        window: M, how many batches' quadratic means are kept.
        backward_window: M', the same for gradients.
        warmup_iters: Batches that are normalized by themselves.
        outlier_filtration: Whether outliers are looked for.
        eps: Added to the quadratic mean.
        momentum: Weight of the new batch in running_var and ema_gz.
    """

    running = "running_var"

    def __init__(
        self,
        num_features: int,
        *,
        window: int,
        backward_window: int,
        warmup_iters: int,
        outlier_filtration: bool,
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.warmup_iters = warmup_iters
        self.outlier_filtration = outlier_filtration
        self.running_var: Tensor
        self.buffer_x2: Tensor
        self.buffer_gz: Tensor
        self.skip_counter: Tensor
        self.register_buffer("buffer_x2", torch.zeros(window, num_features))
        self.register_buffer("buffer_gz", torch.zeros(backward_window, num_features))
        self.register_buffer("skip_counter", torch.zeros((), dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Return all that was estimated to its start."""
        super().reset_running_stats()
        for buffer in (self.buffer_x2, self.buffer_gz, self.skip_counter):
            buffer.zero_()

    @uncompiled
    def _train(self, x: Tensor, square: Tensor) -> Tensor:
        batch, rate = self._track(square), self.momentum or 0.0
        weight, bias = widened(self.weight), widened(self.bias)
        y: Tensor = _Unified.apply(x, weight, bias, (self.buffer_gz, self.ema_gz), (self.eps, rate), *batch)
        return y

    @torch.no_grad()
    def _track(self, square: Tensor) -> _Batch:
        """Take a batch's quadratic mean into the window and running_var.

        All of it is arithmetic of tensors: no number is read back from an accelerator.
        """
        t, running = self.iters.add_(1), widened(self.running_var)
        count = len(self.buffer_x2)
        row, geometric, outlier = self._window(t, square, running)
        self.buffer_x2.index_copy_(0, row, torch.where(outlier, running, square).to(self.buffer_x2.dtype)[None])
        self.skip_counter.add_(outlier)
        skipped = outlier | (count <= 1) | (self.momentum is None)
        early = t < self.warmup_iters
        var = torch.where(skipped | early | (t <= count), square, geometric)
        ratio = ((var + self.eps).sqrt() / (running + self.eps).sqrt()).clamp_(1 / LARGEST_RATIO, LARGEST_RATIO)
        if self.momentum is None:
            self.running_var.copy_(running + (square - running) / t)
        else:
            self.running_var.copy_(running.lerp(var, self.momentum))
        gradients = len(self.buffer_gz)
        return _Batch(
            var=var,
            ratio=torch.where(skipped | (t <= max(WITHOUT_RATIO, self.warmup_iters)), 1.0, ratio),
            skipped=skipped,
            by_itself=skipped | early | (t <= gradients),
            row=(t % gradients).view(1),
        )

    def _window(self, t: Tensor, square: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch's row, the window's geometric mean with the batch in it, and whether it is an outlier."""
        rows = widened(self.buffer_x2)
        count = len(rows)
        rows = torch.where((rows == 0).all(1, keepdim=True), running, rows)
        spread, row = rows.sqrt().var(), (t % count).view(1)
        rows = rows.index_copy(0, row, square[None])
        geometric = rows.log().mean(0).exp()
        outlier = torch.zeros((), dtype=torch.bool, device=square.device)
        if self.outlier_filtration and self.momentum is not None:
            outlier = (t >= self.warmup_iters) & (rows.mean(0) - geometric > spread * count).any()
        return row, geometric, outlier

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f"{self.num_features}, eps={self.eps:g}, window={len(self.buffer_x2)}, warmup_iters={self.warmup_iters}, "
            f"backward_window={len(self.buffer_gz)}, outlier_filtration={self.outlier_filtration}"
        )


@dataclass(frozen=True, kw_only=True)
class UnifiedNorm(Norm):
    """Unified normalization and its options.

    Attributes:
        window: M, how many batches' quadratic means are kept, 1 or more.
        backward_window: M', the same for gradients; 0 for M.
        warmup_iters: Training batches that are normalized by themselves, 0 or more. The official default is longer than
            most federated runs; set it to a part of a client's updates.
        outlier_filtration: Whether outliers are looked for. The authors advise it for images, and not for text.
        eps: Added to the quadratic mean, greater than 0.
        momentum: Weight of the new batch in the running statistics, in (0, 1]. The official ``momentum``, 0.9, is that
            of the old value.

    Raises:
        ConfigError: An option is out of range.
    """

    window: int = 4
    backward_window: int = 0
    warmup_iters: int = 4000
    outlier_filtration: bool = True
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.whole("unified_norm", "window", self.window, at_least=1)
        options.whole("unified_norm", "backward_window", self.backward_window, at_least=0)
        options.whole("unified_norm", "warmup_iters", self.warmup_iters, at_least=0)
        options.flag("unified_norm", "outlier_filtration", self.outlier_filtration)
        options.number("unified_norm", "eps", self.eps, above=0)
        options.number("unified_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("unified_norm", spatial_dims)
        return UnifiedNormLayer(
            num_channels,
            window=self.window,
            backward_window=self.backward_window or self.window,
            warmup_iters=self.warmup_iters,
            outlier_filtration=self.outlier_filtration,
            eps=self.eps,
            momentum=self.momentum,
        )


SPEC = NormSpec(
    name="unified_norm",
    summary="y = x / sqrt(geometric mean of recent mean squares + eps) * weight + bias; an approximate backward pass.",
    citation=Citation(
        title="Unified Normalization for Accelerating and Stabilizing Transformers",
        authors="Yang, Yuan, Ding, Hao, Ma, Gao, Wang",
        year=2022,
        arxiv="2208.01313",
        where="official code hikvision-research/Unified-Normalization, unified_normalization.py",
    ),
    make=UnifiedNorm,
    exact_backward=False,
    layers=(UnifiedNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_var": TensorSpec(Kind.QUADRATIC),
        "ema_gz": TensorSpec(Kind.GRAD_STAT, Carry.RESET),
        "iters": TensorSpec(Kind.COUNT, Carry.RESET),
        "buffer_x2": TensorSpec(Kind.WINDOW, Carry.RESET),
        "buffer_gz": TensorSpec(Kind.WINDOW, Carry.RESET),
        "skip_counter": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "The backward pass is an approximation for a window of 2 or more, as published.",
        "An empty row of the window stands for running_var; the official code takes its zeros into the geometric mean.",
        "momentum weighs the new batch, as in the other norms; the official momentum, 0.9, weighs the old value.",
        "Outliers are looked for by default, which the authors advise for images; the official class's default is not.",
        "Each position of a feature map is a token.",
        "A batch with one value per channel, of which the division would leave the sign, is refused in training.",
        "Costs about twice nn.BatchNorm2d on a CPU at a batch of 32, and 4 times at a batch of 1, the window's.",
    ),
    verified=(
        "golden traces un_nofilter and un_filter of hikvision-research/Unified-Normalization: outputs, gradients and "
        "buffers through warm-up, the full window, the clamped ratio and skipped outliers, with padding.",
        "its formula in float64; a gradient check fails, as it must, and passes for a window of 1.",
    ),
)
