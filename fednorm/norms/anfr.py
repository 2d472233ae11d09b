"""ANFR: scaled weight standardization, and channel attention after each standardized convolution.

Siomos, Naval-Marimont, Passerat-Palmbach, Tarroni. An Architecture Built for Federated Learning: Addressing Data
Heterogeneity through Adaptive Normalization-Free Feature Recalibration. TMLR 2025. https://arxiv.org/abs/2410.02006

    h = conv(x, w_hat) + b                                   w_hat as of ``sws``: nothing normalizes activations
    s[n, c] = mean over positions of h[n, c]
    ECA:  g = sigmoid(conv1d(s, k))                          over neighbouring channels; k odd, by C
    SE:   g = sigmoid(W_2 relu(W_1 s + b_1) + b_2)           through max(1, C / 16) features
    y = gate_gain * g * h,      activation(y) = gamma * f(y)

ECA is Wang et al., arXiv 1910.03151, with k = |log2(C) + 1| / 2 made odd, 3 at least, as in timm; SE is Hu, Shen, Sun,
arXiv 1709.01507. A gate begins near 1/2, and in a network without normalization each one would halve the signal:
``gate_gain = 2`` takes that back, as in NF-ResNets with attention (Brock, De, Smith, arXiv 2101.08692, and timm).

Only maps (N, C, H, W) are recalibrated; linear layers stay plain. Train = eval; no buffers; a batch of one works.

Federated: no statistic exists and every tensor is shared, the attention's as other weights.
Continual: nothing is carried over but weights.
Differs: the paper's ResNets have one attention a residual block, here it stands after every convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._precision import in_full_precision, widened
from fednorm.norms.sws import ScaledWeightStandardization
from fednorm.recognition.tensor_kinds import declare_tensors
from fednorm.roles import Kind
from fednorm.spec import NormSpec, TensorSpec

REDUCTION = 16
"""How many times fewer features SE's hidden layer has than the map has channels."""


def kernel_size(channels: int) -> int:
    """Return ECA's: |log2(C) + 1| / 2 rounded down, the next odd number where that is even, and 3 at least."""
    size = int(abs(math.log2(channels) + 1) / 2)
    return max(size + (size + 1) % 2, 3)


class ChannelAttention(nn.Module):
    """A gate for each channel of a map, computed from the means of all of them; subclasses say how.

    Args:
        gate_gain: What the gates are multiplied by.
    """

    def __init__(self, gate_gain: float) -> None:
        super().__init__()
        self.gate_gain = gate_gain

    def gates(self, means: Tensor) -> Tensor:
        """Return the gates before the sigmoid, shape (N, C), from the channels' means, shape (N, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the recalibrated map, of the shape of ``x``; what is no map (N, C, H, W) passes as it is."""
        return self._recalibrated(x) if x.ndim == 4 else x

    @in_full_precision
    def _recalibrated(self, x: Tensor) -> Tensor:
        return x * (self.gate_gain * self.gates(x.mean((2, 3))).sigmoid())[:, :, None, None]


class EfficientChannelAttention(ChannelAttention):
    """ECA: one short convolution over the channels, without a bias.

    Args:
        channels: C.
        gate_gain: What the gates are multiplied by.
    """

    def __init__(self, channels: int, gate_gain: float) -> None:
        super().__init__(gate_gain)
        size = kernel_size(channels)
        self.weight = nn.Parameter(torch.empty(1, 1, size))
        nn.init.uniform_(self.weight, -1 / math.sqrt(size), 1 / math.sqrt(size))  # as nn.Conv1d

    def gates(self, means: Tensor) -> Tensor:
        """Convolve the means along the channels."""
        weight = widened(self.weight)
        return functional.conv1d(means[:, None], weight, padding=weight.shape[2] // 2)[:, 0]

    def extra_repr(self) -> str:
        """Return the kernel's size and the gain."""
        return f"kernel_size={self.weight.shape[2]}, gate_gain={self.gate_gain:g}"


class SqueezeExcitation(ChannelAttention):
    """SE: two linear layers, with fewer features between them.

    Args:
        channels: C.
        gate_gain: What the gates are multiplied by.
    """

    def __init__(self, channels: int, gate_gain: float) -> None:
        super().__init__(gate_gain)
        self.down_weight: nn.Parameter
        hidden = max(1, channels // REDUCTION)
        for name, (out, into) in {"down": (hidden, channels), "up": (channels, hidden)}.items():
            bound = 1 / math.sqrt(into)  # as nn.Linear
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(out, into).uniform_(-bound, bound)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(out).uniform_(-bound, bound)))

    def gates(self, means: Tensor) -> Tensor:
        """Pass the means through both layers."""
        down, up = (
            (widened(getattr(self, f"{n}_weight")), widened(getattr(self, f"{n}_bias"))) for n in ("down", "up")
        )
        return functional.linear(functional.linear(means, *down).relu(), *up)

    def extra_repr(self) -> str:
        """Return the sizes and the gain."""
        out, into = self.down_weight.shape
        return f"{into}, hidden={out}, gate_gain={self.gate_gain:g}"


declare_tensors(
    SqueezeExcitation, down_weight=Kind.WEIGHT, down_bias=Kind.WEIGHT, up_weight=Kind.WEIGHT, up_bias=Kind.WEIGHT
)


@dataclass(frozen=True, kw_only=True)
class ANFR(ScaledWeightStandardization):
    """Scaled weight standardization with channel attention, and the options of both.

    Attributes:
        gate: How the gates are computed, ``eca`` or ``se``.
        gate_gain: What the gates are multiplied by, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    gate: str = "eca"
    gate_gain: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        options.one_of("anfr", "gate", self.gate, ("eca", "se"))
        options.number("anfr", "gate_gain", self.gate_gain, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the attention for maps, and nothing for tokens and features."""
        if spatial_dims != 2:
            return nn.Identity()
        kind = EfficientChannelAttention if self.gate == "eca" else SqueezeExcitation
        return kind(num_channels, self.gate_gain)


SPEC = NormSpec(
    name="anfr",
    summary="Scaled weight standardization (sws), and channel attention, ECA or SE, after every convolution.",
    citation=Citation(
        title="An Architecture Built for Federated Learning: Addressing Data Heterogeneity through Adaptive "
        "Normalization-Free Feature Recalibration",
        authors="Siomos, Naval-Marimont, Passerat-Palmbach, Tarroni",
        year=2025,
        arxiv="2410.02006",
    ),
    make=ANFR,
    layers=(EfficientChannelAttention,),
    tensors={"weight": TensorSpec(Kind.WEIGHT)},
    normalizes=False,
    scale_invariant=False,
    deviations=(
        "The paper's ResNets have one attention a residual block; here it stands after every convolution.",
        "gate_gain is that of NF-ResNets with attention in timm.",
    ),
    verified=(
        "The convolution as of sws; both attentions against timm's EcaModule and SEModule.",
        "The formula written out in float64, on drawn maps and features.",
    ),
    reconstruction="where the attention stands and what its gates are multiplied by; the code was not at hand.",
)
