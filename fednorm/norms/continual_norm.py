"""Continual normalization: group normalization without affine, then batch normalization with it.

Pham, Liu, Hoi. Continual Normalization: Rethinking Batch Normalization for Online Continual Learning. ICLR 2022.
https://arxiv.org/abs/2203.16102. Official code: phquang/Continual-Normalization.

    z = (x - mean_g) / sqrt(var_g + eps)                   per sample and group of C / num_groups channels
    y = (z - mean_c) / sqrt(var_c + eps) * weight + bias   per channel, over the batch and all positions

Running moments are those of z, by PyTorch's conventions (unbiased running variance, ``momentum`` weighs the new batch).
Evaluation still computes the group moments of each sample, then uses the running moments.

Cost: two normalizations, each by PyTorch's fused kernel: about twice batch normalization's on maps. Tokens are eight to
thirteen times layer normalization's: the group normalization hands them on in a layout that the second takes slowly.
Federated: five tensors, as batch normalization; the running moments are those of maps already normalized per sample.
Continual: everything is kept. Scale and shift are learned, as in the official code; AdaB2N's comparison (arXiv
2310.08855) took them away.
Differs: batches are counted (the official forward pass leaves ``num_batches_tracked`` at 0). Two groups by default, as
group_norm has; the official class-incremental runs have 32, which do not divide a slim ResNet-18's 20 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import BatchLayer, check_spatial_dims
from fednorm.norms.group_norm import checked_groups
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class ContinualNormLayer(BatchLayer):
    """Continual normalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        num_groups: Number of groups; it divides C.
        eps: Added to both variances.
        momentum: Weight of the new batch in the running moments.
    """

    def __init__(self, num_features: int, *, num_groups: int, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong.
        """
        self._check_input_dim(x)
        return super().forward(functional.group_norm(x, self.num_groups, eps=self.eps))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, eps={self.eps:g}, num_groups={self.num_groups}"


@dataclass(frozen=True, kw_only=True)
class ContinualNorm(Norm):
    """Continual normalization and its options.

    Attributes:
        num_groups: Number of groups; it must divide the number of channels of every layer.
        eps: Added to both variances, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    num_groups: int = 2
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.whole("continual_norm", "num_groups", self.num_groups, at_least=1)
        options.number("continual_norm", "eps", self.eps, above=0)
        options.number("continual_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``num_groups`` does not divide ``num_channels``, or ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("continual_norm", spatial_dims)
        groups = checked_groups(num_channels, self.num_groups, spatial_dims)
        return ContinualNormLayer(num_channels, num_groups=groups, eps=self.eps, momentum=self.momentum)


SPEC = NormSpec(
    name="continual_norm",
    summary="y = batch_norm(group_norm(x)), the group normalization without scale and shift.",
    citation=Citation(
        title="Continual Normalization: Rethinking Batch Normalization for Online Continual Learning",
        authors="Pham, Liu, Hoi",
        year=2022,
        arxiv="2203.16102",
        where="official code phquang/Continual-Normalization, cn.py",
    ),
    make=ContinualNorm,
    layers=(ContinualNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "Batches are counted; the official layer's counter stays at 0.",
        "Two groups by default; the official class-incremental runs have 32.",
    ),
    verified=(
        "Golden traces cn_g4, cn_g8: the official layer (phquang/Continual-Normalization), float64.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
