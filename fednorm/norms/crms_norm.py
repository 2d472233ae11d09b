"""CRMS normalization: RMS normalization of a vector with zero mean, of which all entries but the last are stored.

Jiang, Gu, Zhu, Pan. Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers. NeurIPS
2023. https://arxiv.org/abs/2305.14858 (ZixuanJiang/pre-rmsnorm-transformer)

    y = x / sqrt((sum(x^2) + sum(x)^2) / (C + 1) + eps) * weight

x has C entries, those of a vector with C + 1 whose sum is 0: the last one is -sum(x), and the root is over all of them.
For a feature map the sums are over C at each position; ``weight`` is per channel, shape (C,). Train = eval; a batch of
one works; there is no shift, so convolutions keep a bias.

What it is for is the exact rewrite of a transformer that normalizes before its branches (Pre-LN):
``convert(model, "rms_norm", exact=True)`` and ``convert(model, "crms_norm", exact=True)``, see
:mod:`fednorm.conversion.exact`. There the vector really has zero mean; elsewhere the layer is a norm by the formula.

Cost: some elementwise passes and two reductions, each read and written; PyTorch's layer and batch
normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
Federated: no statistics to disagree about; the scale is shared by FedAvg, local under FedBN's rule. Recentring is
linear, so that it commutes with averaging: Pre-LN, Pre-RMSNorm and Pre-CRMSNorm federations stay equal.
Continual: nothing is carried over but the learned scale.
Differs: the paper has no learned scale, which it absorbs into the next linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import per_channel
from fednorm.norms._features import require_channels
from fednorm.norms._precision import in_full_precision
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


def inverse_crms(x: Tensor, dim: int, eps: float) -> Tensor:
    """Return 1 / sqrt((sum(x^2) + sum(x)^2) / (d + 1) + eps) over the d entries of an axis, which stays with length 1.

    Args:
        x: All entries but the last of vectors whose sum is 0.
        dim: The axis.
        eps: Added to the mean square.
    """
    square = x.square().sum(dim, keepdim=True) + x.sum(dim, keepdim=True).square()
    return (square / (x.shape[dim] + 1) + eps).rsqrt()


class CRMSNormLayer(nn.Module):
    """CRMS normalization over the channels of (N, C) and (N, C, ...), with a learned scale per channel.

    Args:
        num_channels: C, the number of stored entries.
        eps: Added to the mean square.
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        return x * (inverse_crms(x, 1, self.eps) * per_channel(self.weight, x))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, eps={self.eps:g}"


@dataclass(frozen=True, kw_only=True)
class CRMSNorm(Norm):
    """CRMS normalization and its option.

    Attributes:
        eps: Added to the mean square, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.number("crms_norm", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a CRMS normalization over C channels; it takes any number of spatial axes."""
        del spatial_dims
        return CRMSNormLayer(num_channels, eps=self.eps)

    @property
    def shifts(self) -> bool:
        """Return False: the layer only scales, so every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="crms_norm",
    summary="y = x / sqrt((sum(x^2) + sum(x)^2) / (C + 1) + eps) * weight, over the channels of each position.",
    citation=Citation(
        title="Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
        authors="Jiang, Gu, Zhu, Pan",
        year=2023,
        arxiv="2305.14858",
        where="Section 3; ZixuanJiang/pre-rmsnorm-transformer, torch/customized_layer.py",
    ),
    make=CRMSNorm,
    layers=(CRMSNormLayer,),
    tensors={"weight": TensorSpec(Kind.SCALE, Carry.KEEP)},
    verified=(
        "the golden traces pre_rmsnorm and zero_mean_linear, recorded with the official modules",
        "the formula in float64; RMS normalization of the whole vector",
    ),
    deviations=(
        "A learned scale per channel, as our other norms have it; the paper absorbs it into the next linear layer.",
        "The exact rewrite keeps every parameter of the network: weights are recentred within the forward pass, and a "
        "norm gives back all entries; the paper folds both into the weights.",
    ),
)
