"""Hybrid batch normalization: moments mixed, by a learned share per channel, of a batch and of all clients.

Chen, Xu, Wu, Kittler. Hybrid Batch Normalisation: Resolving the Dilemma of Batch Normalisation in Federated Learning.
ICML 2025. https://arxiv.org/abs/2505.21877.
Official code: Hongyao-Chen/HybridBN, FedBaseline/models/FedHBN.

    a    = sigmoid(distribution_factor)                            per channel; learned, begins at 1/2
    mean = (1 - a) running_mean + a batch mean
    var  = (1 - a) running_var + a batch variance, biased          gradients go through a and the batch's moments
    y    = (x - mean) / sqrt(var + eps) * weight + bias
    evaluation: y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

``running_mean`` and ``running_var`` are the official ``global_mean`` and ``global_var``: those of all clients. Where
nobody sets them, on a stream and under a strategy that knows nothing of this method, they move with every training
batch as batch normalization's do. Strategy ``hbn`` holds them still while a client trains, and estimates them in a
second pass over the clients: each adds up the moments of some of its images (:class:`Estimate`), and the server pools
them (:func:`pooled_estimates`), with n - 1 as for an unbiased variance.

Federated: the share is a client's own (``hbn``, FedBN); strategy ``fbn`` is a share of 0.
Continual: everything is kept.
Differs: the sums of the second pass are no buffers of the layer; they live as long as the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import DataError
from fednorm.norms._batch import (
    BatchLayer,
    batch_moments,
    batch_norm,
    check_spatial_dims,
    per_channel,
    scaled_by,
    scaled_by_backward,
)
from fednorm.norms._compile import uncompiled
from fednorm.norms._precision import in_full_precision, widened
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

IMAGES = 64
"""Most images of a client that the second pass looks at, in one batch; as in the official code."""


@dataclass
class Estimate:
    """Moments added up over batches, by the official rule.

        n' = n + samples;   mean' = (n mean + samples m) / n'
        var' = (n var + samples v + samples (m - mean')^2) / n'

    The shift of the old part, n (mean - mean')^2, is left out as in the official code: of several batches these are not
    the moments of their union. The second pass has one batch a client, for which they are.

    Attributes:
        count: n, in samples.
        mean: (C,).
        var: (C,).
    """

    count: float
    mean: Tensor
    var: Tensor

    @torch.no_grad()
    def add(self, mean: Tensor, var: Tensor, samples: int) -> None:
        """Add a batch's moments."""
        total = self.count + samples
        moved = (self.count * self.mean + samples * mean) / total
        self.var = (self.count * self.var + samples * (var + (mean - moved).square())) / total
        self.count, self.mean = total, moved


@dataclass
class Held:
    """Moments that stay as they are for a while, as constants, while running moments become those of the batches seen.

    The running moments are then the mean over these batches, each counting alike, of their means and of their biased
    variances.

    Attributes:
        mean: (C,).
        var: (C,).
        batches: Batches seen.
    """

    mean: Tensor
    var: Tensor
    batches: int = 0

    def next_rate(self) -> float:
        """Count a batch, and return its weight in the running moments."""
        self.batches += 1
        return 1.0 / self.batches


class _Hybrid(torch.autograd.Function):
    """The normalization by mixed moments, with its gradient, whose sums PyTorch's fused kernel makes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        share: Tensor,
        moments: tuple[Tensor, Tensor, Tensor, Tensor],
        mixed: tuple[Tensor, Tensor],
        eps: float,
    ) -> Tensor:
        """Normalize by ``mixed``; ``moments`` are the batch's mean and variance and all clients', for ``share``."""
        batch_mean, batch_var, mean, var = moments
        ctx.save_for_backward(x, weight, share, batch_mean, batch_mean - mean, batch_var - var, *mixed)
        ctx.eps = eps
        return scaled_by(x, *mixed, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and share."""
        x, weight, share, batch_mean, mean_gap, var_gap, mean, var = ctx.saved_tensors
        gx, gw, gb = scaled_by_backward(gy, x, mean, var, weight, ctx.eps)
        inverse = (var + ctx.eps).rsqrt()
        g_mean = -inverse * weight * gb
        g_var = -0.5 * inverse.square() * weight * gw
        # Of the batch's moments: d mean / dx = 1 / n, d var / dx = 2 (x - batch_mean) / n.
        count = x.numel() / len(weight)
        slope = share * g_var * (2 / count)
        gx = torch.addcmul(gx, x, per_channel(slope, x)).add_(
            per_channel(share * g_mean / count - slope * batch_mean, x)
        )
        return gx, gw, gb, g_mean * mean_gap + g_var * var_gap, None, None, None


class HybridBNLayer(BatchLayer):
    """Hybrid batch normalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running moments; 0 where somebody else sets them. None averages all
            batches alike and normalizes each by itself: how statistics are estimated anew.

    Attributes:
        estimate: Where the mixed moments of every training batch are added up; None for nowhere.
        held: What every training batch is normalized by in place of mixed moments, without the share; None for mixed
            moments. Strategy ``fbn`` sets it.
    """

    def __init__(self, num_features: int, *, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.distribution_factor = nn.Parameter(torch.zeros(num_features))
        self.estimate: Estimate | None = None
        self.held: Held | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong.
        """
        self._check_input_dim(x)
        if not self.training:
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self._train(x)

    @uncompiled
    @in_full_precision
    def _train(self, x: Tensor) -> Tensor:
        batch_mean, batch_var = batch_moments(x)
        count = x.numel() / self.num_features
        if self.held is not None:
            self.count_batch()
            self.update(batch_mean, batch_var, self.held.next_rate())
            mean, var = widened(self.held.mean), widened(self.held.var)
            return scaled_by(x, mean, var, widened(self.weight), widened(self.bias), self.eps)
        factor = widened(self.distribution_factor)
        share = torch.ones_like(factor) if self.momentum is None else factor.sigmoid()
        old_mean, old_var = widened(self.running_mean), widened(self.running_var)
        with torch.no_grad():
            mean, var = old_mean.lerp(batch_mean, share), old_var.lerp(batch_var, share)
        moments = batch_mean, batch_var, old_mean, old_var
        weight, bias = widened(self.weight), widened(self.bias)
        y: Tensor = _Hybrid.apply(x, weight, bias, share, moments, (mean, var), self.eps)
        if self.estimate is not None:
            self.estimate.add(mean, var, len(x))
        elif rate := self.count_batch():
            self.update(batch_mean, batch_var * (count / (count - 1)), rate)
        return y

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, eps={self.eps:g}"


def hybrid_layers(model: nn.Module) -> dict[str, HybridBNLayer]:
    """Return a model's layers of this method, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, HybridBNLayer)}


@torch.no_grad()
def measured(model: nn.Module, images: Tensor) -> dict[str, Estimate]:
    """Return what every layer of this method makes of one batch in a training forward pass; nothing is changed.

    Args:
        model: The model; layers of this method train, all others are in evaluation mode.
        images: Two or more samples, as the model takes them.

    Returns:
        The mixed moments by the layer's path.

    Raises:
        DataError: There are fewer than two images.
    """
    if len(images) < 2:
        raise DataError(f"Moments are estimated from two or more images; got {len(images)}.")
    with _estimating(model) as estimates:
        model(images)
    return estimates


@contextmanager
def _estimating(model: nn.Module) -> Iterator[dict[str, Estimate]]:
    layers, modes = hybrid_layers(model), {module: module.training for module in model.modules()}
    found: dict[str, Estimate] = {}
    model.eval()
    for path, layer in layers.items():
        zeros = torch.zeros_like(widened(layer.running_mean))
        found[path] = layer.estimate = Estimate(0.0, zeros, zeros)
        layer.train()
    try:
        yield found
    finally:
        for layer in layers.values():
            layer.estimate = None
        for module, mode in modes.items():
            module.training = mode


def pooled_estimates(estimates: Sequence[Mapping[str, Estimate]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the moments of all clients, by the layer's path, from each client's.

        mean = sum_i n_i mean_i / n;   var = sum_i n_i (var_i + (mean_i - mean)^2) / (n - 1),   n_i in samples

    Args:
        estimates: Of one client or more, with the same paths; two samples or more in all.

    Returns:
        Mean and variance in float64.

    Raises:
        DataError: There are fewer than two samples.
    """
    pooled = {}
    for path in estimates[0] if estimates else ():
        of_layer = [client[path] for client in estimates]
        total = sum(one.count for one in of_layer)
        if total < 2:
            raise DataError(f"The variance of all clients needs two or more samples; layer {path!r} has {total:g}.")
        mean = torch.stack([one.count * one.mean.double() for one in of_layer]).sum(0) / total
        spread = [one.count * (one.var.double() + (one.mean.double() - mean).square()) for one in of_layer]
        pooled[path] = mean, torch.stack(spread).sum(0) / (total - 1)
    return pooled


@dataclass(frozen=True, kw_only=True)
class HybridBN(Norm):
    """Hybrid batch normalization and its options.

    Attributes:
        eps: Added to the variance, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1]; strategy ``hbn`` sets them itself.

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.number("hybrid_bn", "eps", self.eps, above=0)
        options.number("hybrid_bn", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("hybrid_bn", spatial_dims)
        return HybridBNLayer(num_channels, eps=self.eps, momentum=self.momentum)


SPEC = NormSpec(
    name="hybrid_bn",
    summary="Batch norm by moments that a learned share per channel mixes of the batch's and all clients'.",
    citation=Citation(
        title="Hybrid Batch Normalisation: Resolving the Dilemma of Batch Normalisation in Federated Learning",
        authors="Chen, Xu, Wu, Kittler",
        year=2025,
        arxiv="2505.21877",
        where="Section 3 and Algorithm 1; official code Hongyao-Chen/HybridBN, FedBaseline/models/FedHBN",
    ),
    make=HybridBN,
    layers=(HybridBNLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "distribution_factor": TensorSpec(Kind.GATE),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    scale_invariant=False,
    deviations=(
        "Where no strategy sets the moments of all clients, they move with every training batch; strategy hbn sets "
        "them as published.",
        "The sums of the second pass are not in the state dict; the official layer's are.",
        "Costs about twice nn.BatchNorm2d on a CPU at a batch of 32: moments and normalization are two passes.",
    ),
    verified=(
        "golden trace hybridbn_layer of Hongyao-Chen/HybridBN: outputs, gradients and the sums of the second pass.",
        "golden trace hybridbn_merge: two rounds of three clients, the second pass and the server's merge.",
        "its formula in float64.",
    ),
)
