"""PreAffine: a learned scale per channel before RMS normalization, beside the one after it.

Qwen team. A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling. 2026.
https://arxiv.org/abs/2601.22966

    u = pre_weight * x,      y = u / sqrt(mean_C(u^2) + eps) * weight

The mean is over the C channels of one position of one sample; ``pre_weight`` and ``weight`` are per channel, shape
(C,), first 1: the layer begins as RMS normalization. A small entry of ``pre_weight`` takes a channel with massive
activations out of the statistic without the network having to make it small. Train = eval; a batch of one works; no
shift, so that convolutions keep a bias.

Cost: some elementwise passes and one reduction, each read and written; PyTorch's layer and batch
normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
Federated: no statistics to disagree about; both tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but the learned scales.
Differs: no official code is known; the formula is that of four independent texts that agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import per_channel
from fednorm.norms._features import inverse_rms, require_channels
from fednorm.norms._precision import in_full_precision
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class PreAffineLayer(nn.Module):
    """RMS normalization of the scaled channels of (N, C) and (N, C, ...), at each position by itself.

    Args:
        num_channels: C.
        eps: Added to the mean square.
    """

    def __init__(self, num_channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.pre_weight = nn.Parameter(torch.ones(num_channels))
        self.weight = nn.Parameter(torch.ones(num_channels))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        scaled = x * per_channel(self.pre_weight, x)
        return scaled * (inverse_rms(scaled, self.eps) * per_channel(self.weight, x))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, eps={self.eps:g}"


@dataclass(frozen=True, kw_only=True)
class PreAffine(Norm):
    """PreAffine and its option.

    Attributes:
        eps: Added to the mean square, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.number("pre_affine", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a layer for C channels; it takes any number of spatial axes."""
        del spatial_dims
        return PreAffineLayer(num_channels, eps=self.eps)

    @property
    def shifts(self) -> bool:
        """Return False: the layer only scales, so every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="pre_affine",
    summary="y = RMSNorm(pre_weight * x) over the channels of each position, with learned scales before and after.",
    citation=Citation(
        title="A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling",
        authors="Qwen team",
        year=2026,
        arxiv="2601.22966",
    ),
    make=PreAffine,
    layers=(PreAffineLayer,),
    tensors={"pre_weight": TensorSpec(Kind.SCALE, Carry.KEEP), "weight": TensorSpec(Kind.SCALE, Carry.KEEP)},
    verified=("torch.nn.RMSNorm of the scaled input", "the formula in float64"),
    deviations=("The formula is third-hand: no official code, and four independent texts that agree.",),
)
