"""BHyT, bounded hyperbolic tangent: a tanh whose input is scaled by its root mean square, so that it does not saturate.

Bounded Hyperbolic Tangent. ICML 2026. https://arxiv.org/abs/2601.09719 (MLAI-Yonsei/BHyT, modeling_llama.py)

    v = mean_C(x^2),      y = weight * tanh(lambd * x / (kappa * sqrt(v + eps)))

The mean is over the C channels of one position of one sample; ``weight`` is per channel, shape (C,), first 1; ``lambd``
is one learned number a layer, shape (1,), first 2; ``kappa`` = 10 is constant: by Chebyshev's bound at most 1 / kappa^2
of the numbers are larger than kappa root mean squares, so that |tanh's argument| <= lambd for 99 % of them. Because
of the division the output does not depend on the input's scale, unlike DyT's. Train = eval; a batch of one works; no
shift, so that convolutions keep a bias.

Cost: some elementwise passes and one reduction, each read and written; PyTorch's layer and batch
normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
Federated: no statistics to disagree about; both tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but these.
Differs: this is the paper's BHyT*, in which every layer measures v. The cheaper BHyT computes the v of a block's second
norm from the first one's and the attention's weights, c = |W_V W_O|^2 / (T D); it saves time in a language model and is
not offered: a layer here knows no other. The schedules of kappa are not either.
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


class BHyTLayer(nn.Module):
    """Bounded hyperbolic tangent for (N, C) and (N, C, ...), at each position by itself.

    Args:
        num_channels: C.
        lambd_init: The first lambda.
        kappa: The constant kappa.
        eps: Added to the mean square.
    """

    def __init__(self, num_channels: int, *, lambd_init: float = 2.0, kappa: float = 10.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.lambd_init = lambd_init
        self.kappa = kappa
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.lambd = nn.Parameter(torch.full((1,), float(lambd_init)))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the squashed input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        scale = inverse_rms(x, self.eps) * (self.lambd / self.kappa)
        return (x * scale).tanh() * per_channel(self.weight, x)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, lambd_init={self.lambd_init:g}, kappa={self.kappa:g}, eps={self.eps:g}"


@dataclass(frozen=True, kw_only=True)
class BHyT(Norm):
    """Bounded hyperbolic tangent and its options.

    Attributes:
        lambd_init: The first lambda, greater than 0. The official sweep has 2 and 3 for a block's first norm, 1 and 3
            for its second.
        kappa: The constant kappa, greater than 0.
        eps: Added to the mean square, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    lambd_init: float = 2.0
    kappa: float = 10.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        options.number("bhyt", "lambd_init", self.lambd_init, above=0)
        options.number("bhyt", "kappa", self.kappa, above=0)
        options.number("bhyt", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a bounded tanh of C channels; it takes any number of spatial axes."""
        del spatial_dims
        return BHyTLayer(num_channels, lambd_init=self.lambd_init, kappa=self.kappa, eps=self.eps)

    @property
    def shifts(self) -> bool:
        """Return False: the layer only scales, so every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="bhyt",
    summary="y = weight * tanh(lambd * x / (kappa * sqrt(mean_C(x^2) + eps))), with one learned lambd a layer.",
    citation=Citation(
        title="Bounded Hyperbolic Tangent",
        authors="MLAI-Yonsei",
        year=2026,
        arxiv="2601.09719",
        where="BHyT*; MLAI-Yonsei/BHyT, models/hf_src/llama/modeling_llama.py",
    ),
    make=BHyT,
    layers=(BHyTLayer,),
    tensors={"weight": TensorSpec(Kind.SCALE, Carry.KEEP), "lambd": TensorSpec(Kind.SCALE, Carry.KEEP)},
    verified=("the formula of the official code, in float64, number by number",),
    deviations=(
        "Only BHyT*: every layer measures its mean square; the block's approximation of the second one is not offered.",
    ),
)
