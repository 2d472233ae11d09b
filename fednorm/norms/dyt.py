"""DyT, dynamic tanh: an elementwise squashing in place of normalization.

Zhu, Chen, He, LeCun, Liu. Transformers without Normalization. CVPR 2025. https://arxiv.org/abs/2503.10622

    y = weight * tanh(alpha * x) + bias

``alpha`` is one number a layer, shape (1,), first 0.5; ``weight`` and ``bias`` are per channel, shape (C,), first 1 and
0. No mean, no variance: no sample and no position sees another. Train = eval; a batch of one works. The output is *not*
independent of the input's scale: an input twice as large is squashed more, and a small one is multiplied by alpha. A
deep network with few skip connections can lose its signal at the start, as mobilenet_v2 does: give a larger
``alpha_init``.

Cost: one pass for the tanh and one for the affine map, each read and written; PyTorch's layer and batch
normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
Federated: nothing to disagree about but three learned tensors, shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but these.
Differs: nothing for a layer. ``convert`` starts from alpha, 1 and 0, as the official conversion does: what a layer
normalization had learned is dropped. The official code converts layer normalization only; here every norm is.
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


class DyTLayer(nn.Module):
    """Dynamic tanh for (N, C) and (N, C, ...).

    Args:
        num_channels: C.
        alpha_init: The first alpha.
    """

    def __init__(self, num_channels: int, *, alpha_init: float = 0.5) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.alpha_init = alpha_init
        self.alpha = nn.Parameter(torch.full((1,), float(alpha_init)))
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the squashed input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong.
        """
        require_channels(self, self.num_channels, x)
        return torch.addcmul(per_channel(self.bias, x), (x * self.alpha).tanh(), per_channel(self.weight, x))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, alpha_init={self.alpha_init:g}"


@dataclass(frozen=True, kw_only=True)
class DyT(Norm):
    """Dynamic tanh and its option.

    Attributes:
        alpha_init: The first alpha, greater than 0. The paper has 0.5, and for language models 0.05 to 0.8 by place.

    Raises:
        ConfigError: An option is out of range.
    """

    alpha_init: float = 0.5

    def __post_init__(self) -> None:
        options.number("dyt", "alpha_init", self.alpha_init, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a dynamic tanh of C channels; it takes any number of spatial axes."""
        del spatial_dims
        return DyTLayer(num_channels, alpha_init=self.alpha_init)


SPEC = NormSpec(
    name="dyt",
    summary="y = weight * tanh(alpha * x) + bias, elementwise, with one learned alpha a layer and no statistics.",
    citation=Citation(
        title="Transformers without Normalization",
        authors="Zhu, Chen, He, LeCun, Liu",
        year=2025,
        arxiv="2503.10622",
        where="Equation 3; jiachenzhu/DyT, dynamic_tanh.py",
    ),
    make=DyT,
    layers=(DyTLayer,),
    tensors={
        "alpha": TensorSpec(Kind.SCALE, Carry.KEEP),
        "weight": TensorSpec(Kind.SCALE, Carry.KEEP),
        "bias": TensorSpec(Kind.SHIFT, Carry.KEEP),
    },
    scale_invariant=False,
    verified=("the golden trace dyt, recorded with the official layer and conversion", "the formula in float64"),
)
