"""GatedNorm: RMS normalization, and a gate per channel that the normalized input itself opens and closes.

Qwen team. A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling. 2026.
https://arxiv.org/abs/2601.22966

    y = x / sqrt(mean_C(x^2) + eps) * weight
    z = gate_scale * sigmoid(up @ silu(down @ y)) * y

At each position of each sample by itself. ``weight`` is per channel, shape (C,), first 1; ``down`` has shape (rank, C),
``up`` (C, rank), neither with a bias. The gate gives the network a way to make all of a token small, for which it
otherwise grows outliers. Train = eval; a batch of one works; no shift, so that convolutions keep a bias.

Cost: some elementwise passes, one reduction and two small matrix products, each read and written; PyTorch's layer and
batch normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
Federated: no statistics to disagree about; all tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but these.
Differs: no official code is known. How the gate begins is not confirmed: here ``up`` = 0 and a factor of 2, so that the
layer begins as RMS normalization, and a network can be converted without a change of its function; ``gate_scale=1`` is
the formula as printed, which begins by halving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._batch import per_channel
from fednorm.norms._features import inverse_rms, require_channels
from fednorm.norms._precision import in_full_precision, widened
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

_CONVOLUTIONS: Mapping[int, Callable[[Tensor, Tensor], Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class GatedNormLayer(nn.Module):
    """Gated RMS normalization over the channels of (N, C) and (N, C, ...), at each position by itself.

    Args:
        num_channels: C.
        rank: Width of the gate's hidden layer.
        gate_scale: Factor of the gate.
        eps: Added to the mean square.
    """

    def __init__(self, num_channels: int, *, rank: int = 16, gate_scale: float = 2.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.rank = rank
        self.gate_scale = gate_scale
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.down = nn.Parameter(torch.randn(rank, num_channels) / math.sqrt(num_channels))
        self.up = nn.Parameter(torch.zeros(num_channels, rank))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the gated normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        y = x * (inverse_rms(x, self.eps) * per_channel(self.weight, x))
        gate = _at_positions(F.silu(_at_positions(y, self.down)), self.up).sigmoid()
        return y * gate * self.gate_scale

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, rank={self.rank}, gate_scale={self.gate_scale:g}, eps={self.eps:g}"


def _at_positions(x: Tensor, matrix: Tensor) -> Tensor:
    """Return matrix @ x over the channels of (N, C, ...); a 1 x 1 convolution keeps the memory's layout."""
    matrix = widened(matrix)
    if x.ndim == 2:
        return F.linear(x, matrix)
    convolve = _CONVOLUTIONS.get(x.ndim)
    if convolve is None:
        return F.linear(x.movedim(1, -1), matrix).movedim(-1, 1)
    return convolve(x, matrix.view(*matrix.shape, *[1] * (x.ndim - 2)))


@dataclass(frozen=True, kw_only=True)
class GatedNorm(Norm):
    """Gated RMS normalization and its options.

    Attributes:
        rank: Width of the gate's hidden layer, 1 or more. The texts have 16, others up to 128.
        gate_scale: Factor of the gate, greater than 0: 2 begins as RMS normalization, 1 is the formula as printed.
        eps: Added to the mean square, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    rank: int = 16
    gate_scale: float = 2.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.whole("gated_norm", "rank", self.rank, at_least=1)
        options.number("gated_norm", "gate_scale", self.gate_scale, above=0)
        options.number("gated_norm", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a layer for C channels; it takes any number of spatial axes."""
        del spatial_dims
        return GatedNormLayer(num_channels, rank=self.rank, gate_scale=self.gate_scale, eps=self.eps)

    @property
    def shifts(self) -> bool:
        """Return False: the layer only scales, so every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="gated_norm",
    summary="z = gate_scale * sigmoid(up @ silu(down @ y)) * y with y = RMSNorm(x), at each position.",
    citation=Citation(
        title="A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling",
        authors="Qwen team",
        year=2026,
        arxiv="2601.22966",
    ),
    make=GatedNorm,
    layers=(GatedNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE, Carry.KEEP),
        "down": TensorSpec(Kind.GATE, Carry.KEEP),
        "up": TensorSpec(Kind.GATE, Carry.KEEP),
    },
    verified=("the formula in float64, number by number", "torch.nn.RMSNorm before the first step"),
    reconstruction="How the gate begins (up = 0), its factor of 2, and its rank for a given width.",
    deviations=(
        "A factor of 2 on the gate, so that the layer begins as RMS normalization; gate_scale=1 is as printed.",
    ),
)
