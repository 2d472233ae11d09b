"""RMS normalization: each sample is divided by its root mean square; nothing is subtracted, nothing is added.

Zhang, Sennrich. Root Mean Square Layer Normalization. NeurIPS 2019. https://arxiv.org/abs/1910.07467

    y = x / sqrt(mean(x^2) + eps) * weight

with ``weight`` per channel, shape (C,). For a feature map the option ``over`` says what the mean is over, as for
layer_norm:

* ``sample`` (default): over (C, H, W) of one sample.
* ``channels``: over C at each position; ``torch.nn.RMSNorm`` with the channels last.

For an input (N, C) both are the paper's, over the features. Train = eval; a batch of one works; no running statistics.
There is no shift, so convolutions keep a bias.

Cost: about twice PyTorch's batch normalization on maps, and five times its layer normalization on tokens: PyTorch has a
fused kernel for GPUs only, on a CPU ``F.rms_norm`` is composed of passes as this is.
Federated: no statistics to disagree about; the scale is shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but the learned scale.
Differs from the paper: eps, which the paper does not have, is 1e-5 as in our other norms; PyTorch's default is the
machine epsilon. There is no learned offset, as in PyTorch's layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import per_channel
from fednorm.norms._features import require_channels
from fednorm.norms._precision import in_full_precision
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class RMSNormLayer(nn.Module):
    """RMS normalization for (N, C) and (N, C, ...), with a learned scale per channel.

    Args:
        num_channels: C.
        over: ``sample`` or ``channels``: what the mean square is over.
        eps: Added to the mean square.
    """

    def __init__(self, num_channels: int, *, over: str = "sample", eps: float = 1e-5) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.over = over
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        if self.over == "channels":
            square = x.square().mean(1, keepdim=True)
        else:
            # A norm reads its input once, where a mean of squares writes the squares down first.
            length = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
            square = length.square() / math.prod(x.shape[1:])
        return x * ((square + self.eps).rsqrt() * per_channel(self.weight, x))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, over={self.over}, eps={self.eps:g}"


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """RMS normalization and its options.

    Attributes:
        over: ``sample`` (mean square over C and all positions) or ``channels`` (over C, at each position).
        eps: Added to the mean square, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    over: str = "sample"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.one_of("rms_norm", "over", self.over, ("sample", "channels"))
        options.number("rms_norm", "eps", self.eps, above=0)

    @property
    def on_tokens(self) -> RMSNorm:
        """The method with moments over the features of each token by itself."""
        return replace(self, over="channels")

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return an RMS normalization over C channels; it takes any number of spatial axes."""
        del spatial_dims
        return RMSNormLayer(num_channels, over=self.over, eps=self.eps)

    @property
    def shifts(self) -> bool:
        """Return False: the layer only scales, so every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="rms_norm",
    summary="y = x / sqrt(mean(x^2) + eps) * weight, the mean per sample (or per position) over the channels.",
    citation=Citation(
        title="Root Mean Square Layer Normalization",
        authors="Zhang, Sennrich",
        year=2019,
        arxiv="1910.07467",
        where="Equation 4",
    ),
    make=RMSNorm,
    layers=(RMSNormLayer, nn.RMSNorm),
    tensors={"weight": TensorSpec(Kind.SCALE)},
    verified=(
        "torch.nn.RMSNorm on features, and on maps over the same axes",
        "the formula in float64, number by number",
        "the golden traces pre_rmsnorm and zero_mean_linear of the official Pre-RMSNorm code",
    ),
    deviations=("The scale of a feature map is per channel, so that a network takes any image size.",),
)
