"""Switchable normalization: a learned mixture of instance, layer and batch moments.

Luo, Ren, Peng, Zhang, Li. Differentiable Learning-to-Normalize via Switchable Normalization. ICLR 2019.
https://arxiv.org/abs/1806.10779

    mean = sum_k a_k mean_k,   var = sum_k b_k var_k,   k over instance, layer, batch      (Equation 3)
    a = softmax(mean_weight),  b = softmax(var_weight)                                     (Equation 5)
    y = (x - mean) / sqrt(var + eps) * weight + bias

Instance moments are those of one sample and channel; layer and batch moments follow from them by the law of total
variance (Equation 4), all of them biased. Evaluation takes running moments in place of the batch's. An input (N, C) has
no instance moments, and the mixture has two parts, as in the official code's 1-D layer.

Cost: five to eight times PyTorch's batch normalization: moments of every sample, their mixture and the normalization
with their gradients are elementwise passes, for which there is no fused kernel.
Federated: scale and shift as in batch normalization; the mixture weights are GATEs; running moments are the batch's.
Continual: everything is kept.
Differs from the official code (switchablenorms/Switchable-Normalization): it has the unbiased instance variance, the
paper's formula the biased one, which is ours; its running variance starts at 0, ours at 1. The paper evaluates with
moments averaged over batches that are passed through the trained network; ours are the exponential average, which the
official code offers as ``using_moving_average``, with the same weight 0.1 of the new batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import BatchLayer, check_spatial_dims, per_channel
from fednorm.norms._precision import in_full_precision, widened
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class SwitchNormLayer(BatchLayer):
    """Switchable normalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        spatial_dims: Number of axes after C; without any there are no instance moments.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running moments.
    """

    def __init__(self, num_features: int, spatial_dims: int, *, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        parts = 3 if spatial_dims else 2
        self.mean_weight = nn.Parameter(torch.ones(parts))
        self.var_weight = nn.Parameter(torch.ones(parts))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong.
        """
        self._check_input_dim(x)
        if x.ndim > 2 and len(self.mean_weight) == 3:
            axes = tuple(range(2, x.ndim))
            own_mean = x.mean(axes)
            own_var = (x - per_channel(own_mean, x)).square().mean(axes)
        else:
            own_mean, own_var = x, torch.zeros_like(x)
        layer_mean = own_mean.mean(1, keepdim=True)
        layer_var = (own_var + (own_mean - layer_mean).square()).mean(1, keepdim=True)
        batch_mean, batch_var = self._batch_moments(own_mean, own_var)
        # Features have no moments of their own: where a layer has the gates of a map all the same, two of them count.
        gates = (self.mean_weight, self.var_weight) if x.ndim > 2 else (self.mean_weight[-2:], self.var_weight[-2:])
        mean = _mixture(gates[0], own_mean, layer_mean, batch_mean)
        factor = widened(self.weight) * (_mixture(gates[1], own_var, layer_var, batch_var) + self.eps).rsqrt()
        return torch.addcmul(per_channel(widened(self.bias), x), x - per_channel(mean, x), per_channel(factor, x))

    def _batch_moments(self, own_mean: Tensor, own_var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's moments in training, the running ones in evaluation, shape (C,)."""
        if not self.training:
            return widened(self.running_mean), widened(self.running_var)
        mean = own_mean.mean(0)
        var = (own_var + (own_mean - mean).square()).mean(0)
        self.update(mean, var, self.count_batch())
        return mean, var


def _mixture(gates: Tensor, own: Tensor, layer: Tensor, batch: Tensor) -> Tensor:
    """Return the mixture by the softmax of three gates, or of two without the sample's own moments, shape (N, C)."""
    *first, second, third = widened(gates).softmax(0)
    mixed: Tensor = second * layer + third * batch
    return torch.addcmul(mixed, first[0], own) if first else mixed


@dataclass(frozen=True, kw_only=True)
class SwitchNorm(Norm):
    """Switchable normalization and its options.

    Attributes:
        eps: Added to the variance, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.number("switch_norm", "eps", self.eps, above=0)
        options.number("switch_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("switch_norm", spatial_dims)
        return SwitchNormLayer(num_channels, spatial_dims, eps=self.eps, momentum=self.momentum)


SPEC = NormSpec(
    name="switch_norm",
    summary="y = (x - mean) / sqrt(var + eps) * weight + bias, moments mixed of instance, layer and batch by softmax.",
    citation=Citation(
        title="Differentiable Learning-to-Normalize via Switchable Normalization",
        authors="Luo, Ren, Peng, Zhang, Li",
        year=2019,
        arxiv="1806.10779",
        where="Equations 3 to 5",
    ),
    make=SwitchNorm,
    layers=(SwitchNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "mean_weight": TensorSpec(Kind.GATE),
        "var_weight": TensorSpec(Kind.GATE),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "The instance variance is the paper's biased one; the official code has the unbiased one.",
        "Evaluation uses exponential averages of the batch moments; the paper's default passes batches through again.",
    ),
    verified=(
        "Mixed from the moments of PyTorch's own batch, instance and layer norms; each alone with one gate open.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
