"""SeeDNorm, self-rescaled dynamic normalization: RMS normalization whose scale depends on the input.

SeeDNorm: Self-Rescaled Dynamic Normalization. ICLR 2026. https://arxiv.org/abs/2510.22777

    s_h = tanh(<x_h, beta_h>)        for each of n heads, slices of C / n channels
    y = (weight + alpha * s) * x / sqrt(mean_C(x^2) + eps)

At each position of each sample by itself; s_h serves all channels of its head. ``weight``, ``alpha`` and ``beta`` have
shape (C,), first 1, 1 and 0: the layer begins as RMS normalization, and beta moves first. Because s looks at x before
it is divided, the output keeps something of the input's length, and is *not* independent of its scale. Train = eval
unless ``dropout`` is used; a batch of one works; no shift, so that convolutions keep a bias.

Cost: some elementwise passes and two reductions, each read and written; PyTorch's layer and batch
normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
Federated: no statistics to disagree about; all tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but these. The authors want weight decay on alpha and beta; ours is on everything.
Differs: no official code is known; the formula is that of independent texts that agree. The authors' two tricks for
vision are options that are off: ``dropout`` of the dynamic term (their drop-path rate), and ``divide``, which divides
by the head's width; that it does so within the tanh is our guess. 16 heads are reported for ViT-B; a layer with C
channels has the largest number of heads that divides C and is at most 16 and C / 8, unless ``num_heads`` is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._batch import per_channel
from fednorm.norms._features import inverse_rms, require_channels
from fednorm.norms._precision import in_full_precision
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

MOST_HEADS = 16
"""Heads of a wide layer, where nothing is said."""
CHANNELS_A_HEAD = 8
"""Fewest channels of a head, where nothing is said."""


class SeeDNormLayer(nn.Module):
    """Self-rescaled dynamic normalization over the channels of (N, C) and (N, C, ...).

    Args:
        num_channels: C.
        num_heads: n, which divides C.
        alpha_init: The first alpha.
        divide: Whether the tanh's argument is divided by C / n.
        dropout: Share of the dynamic term that is left out in training.
        eps: Added to the mean square.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        num_heads: int = 1,
        alpha_init: float = 1.0,
        divide: bool = False,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.num_heads = num_heads
        self.alpha_init = alpha_init
        self.divide = divide
        self.dropout = dropout
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.alpha = nn.Parameter(torch.full((num_channels,), float(alpha_init)))
        self.beta = nn.Parameter(torch.zeros(num_channels))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        width = self.num_channels // self.num_heads
        weighted = x * per_channel(self.beta, x)
        heads: Tensor = weighted.unflatten(1, (self.num_heads, width)).sum(2)  # type: ignore[no-untyped-call]
        s = (heads / width if self.divide else heads).tanh()
        dynamic = s.repeat_interleave(width, 1) * per_channel(self.alpha, x)
        if self.dropout:
            dynamic = F.dropout(dynamic, self.dropout, self.training)
        return x * inverse_rms(x, self.eps) * (dynamic + per_channel(self.weight, x))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, num_heads={self.num_heads}, divide={self.divide}, eps={self.eps:g}"


def heads_of(num_channels: int, num_heads: int) -> int:
    """Return the number of heads of a layer.

    Args:
        num_channels: C.
        num_heads: The number that was asked for; 0 for the largest divisor of C of at most 16 and C / 8.

    Raises:
        ConfigError: It does not divide C; the message lists the numbers that do.
    """
    divisors = [n for n in range(1, num_channels + 1) if num_channels % n == 0]
    if not num_heads:
        return max(n for n in divisors if n <= max(1, min(MOST_HEADS, num_channels // CHANNELS_A_HEAD)))
    if num_channels % num_heads:
        raise ConfigError(
            f"seednorm splits the channels evenly into heads, but a layer has {num_channels} channels and num_heads is "
            f"{num_heads}. Set num_heads to one of {', '.join(map(str, divisors))}, or to 0 for a number that fits."
        )
    return num_heads


@dataclass(frozen=True, kw_only=True)
class SeeDNorm(Norm):
    """Self-rescaled dynamic normalization and its options.

    Attributes:
        num_heads: n; it must divide the number of channels of every layer. 0 fits it to each layer.
        alpha_init: The first alpha.
        divide: Whether the tanh's argument is divided by the head's width, C / n.
        dropout: Share of the dynamic term alpha * s that is left out in training, at least 0 and less than 1.
        eps: Added to the mean square, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    num_heads: int = 0
    alpha_init: float = 1.0
    divide: bool = False
    dropout: float = 0.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.whole("seednorm", "num_heads", self.num_heads, at_least=0)
        options.number("seednorm", "alpha_init", self.alpha_init)
        options.flag("seednorm", "divide", self.divide)
        options.number("seednorm", "dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"seednorm.dropout is the share that is left out, at least 0 and less than 1; got {self.dropout!r}."
            )
        options.number("seednorm", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a layer for C channels; it takes any number of spatial axes.

        Raises:
            ConfigError: ``num_heads`` does not divide ``num_channels``.
        """
        del spatial_dims
        return SeeDNormLayer(
            num_channels,
            num_heads=heads_of(num_channels, self.num_heads),
            alpha_init=self.alpha_init,
            divide=self.divide,
            dropout=self.dropout,
            eps=self.eps,
        )

    @property
    def shifts(self) -> bool:
        """Return False: the layer only scales, so every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="seednorm",
    summary="y = (weight + alpha * tanh(<x, beta>)) * x / sqrt(mean_C(x^2) + eps), one tanh a head, at each position.",
    citation=Citation(
        title="SeeDNorm: Self-Rescaled Dynamic Normalization",
        authors="ByteDance Seed",
        year=2026,
        arxiv="2510.22777",
    ),
    make=SeeDNorm,
    layers=(SeeDNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE, Carry.KEEP),
        "alpha": TensorSpec(Kind.SCALE, Carry.KEEP),
        "beta": TensorSpec(Kind.GATE, Carry.KEEP),
    },
    scale_invariant=False,
    verified=("the formula in float64, number by number", "torch.nn.RMSNorm before the first step"),
    reconstruction="For vision: the first alpha, where the division by the width stands (divide), and eps.",
    deviations=("16 heads at most, and 8 channels a head at least, unless num_heads is given.",),
)
