"""Layer normalization at each position: over the channels, as ConvNeXt's LayerNorm2d has it.

Ba, Kiros, Hinton. Layer Normalization. 2016. https://arxiv.org/abs/1607.06450; on feature maps: Liu, Mao, Wu,
Feichtenhofer, Darrell, Xie. A ConvNet for the 2020s. CVPR 2022. https://arxiv.org/abs/2201.03545

    y[n, :, p] = (x[n, :, p] - mean_C) / sqrt(var_C + eps) * weight + bias

Mean and biased variance are over the C channels of one position p of one sample; ``weight`` and ``bias`` are per
channel, shape (C,). Of the three functions that are called layer normalization of a feature map this is one; the others
are ``layer_norm`` (over C, H, W, which is ``group_norm`` with one group) and ``nn.LayerNorm([C, H, W])``, which is not
offered. It is ``layer_norm`` with ``over="channels"``, under a name that a table can hold. For an input (N, C), and for
tokens, all are the paper's. Train = eval; a batch of one works.

Federated: no statistics to disagree about; both tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but the learned scale and shift.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._features import require_features
from fednorm.norms.layer_norm import ChannelLayerNorm
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class PositionLayerNorm(ChannelLayerNorm):
    """``layer_norm``'s layer over the channels of each position, as a method with a name of its own."""


@dataclass(frozen=True, kw_only=True)
class LayerNormChannels(Norm):
    """Layer normalization at each position, and its option.

    Attributes:
        eps: Added to the variance, greater than 0. ConvNeXt has 1e-6.

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.number("layer_norm_channels", "eps", self.eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a layer normalization over C channels; it takes any number of spatial axes.

        Raises:
            ConfigError: It would normalize single numbers.
        """
        require_features("layer_norm_channels", num_channels, spatial_dims, over="channels")
        return PositionLayerNorm(num_channels, eps=self.eps)


SPEC = NormSpec(
    name="layer_norm_channels",
    summary="y = (x - mean_C) / sqrt(var_C + eps) * weight + bias, moments over the channels of each position.",
    citation=Citation(
        title="Layer Normalization",
        authors="Ba, Kiros, Hinton",
        year=2016,
        arxiv="1607.06450",
        where="Equation 3; at each position of a feature map: ConvNeXt (arXiv 2201.03545)",
    ),
    make=LayerNormChannels,
    layers=(PositionLayerNorm,),
    tensors={"weight": TensorSpec(Kind.SCALE, Carry.KEEP), "bias": TensorSpec(Kind.SHIFT, Carry.KEEP)},
    verified=("timm's LayerNorm2d", "torch.nn.LayerNorm with the channels last", "the formula in float64"),
)
