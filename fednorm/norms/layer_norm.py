"""Layer normalization: per sample, over the features.

Ba, Kiros, Hinton. Layer Normalization. 2016. https://arxiv.org/abs/1607.06450

    y = (x - mean) / sqrt(var + eps) * weight + bias

with the biased variance, and ``weight`` and ``bias`` per channel, shape (C,). For a feature map "layer normalization"
names different functions; the option ``over`` says which is meant:

* ``sample`` (default): moments over (C, H, W) of one sample, equal to group normalization with one group. What the
  federated comparisons call LN.
* ``channels``: moments over C at each position, ConvNeXt's LayerNorm2d (arXiv 2201.03545).

The second has a name of its own too, ``layer_norm_channels``, for tables; ``group_norm`` with ``num_groups=1`` is the
first. For an input (N, C) both are the paper's layer normalization over the features. A third function of that name,
``nn.LayerNorm([C, H, W])`` with an affine weight per position (AdaB2N's comparisons have it), is not offered: it ties
the network to one image size. Train = eval; a batch of one works.

Federated: no statistics to disagree about; both tensors are shared by FedAvg, local under FedBN's rule.
Continual: nothing is carried over but the learned scale and shift.
Differs from the paper: eps, which the paper does not have, is PyTorch's 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._features import require_features, require_numbers
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class SampleLayerNorm(nn.GroupNorm):
    """Layer normalization over (C, ...) of each sample, with an affine map per channel.

    Args:
        num_channels: C.
        eps: Added to the variance.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(1, num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: A sample is a single number.
        """
        if self.num_channels == 1:
            require_numbers("layer_norm", x)
        return super().forward(x)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization over the channels of (N, C, ...), at each position by itself.

    Args:
        num_channels: C.
        eps: Added to the variance.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, ...) over its axis 1; the memory layout stays as it was."""
        last = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        y = last.movedim(-1, 1)
        # Without this, every layer after the first would silently run on channels-last strides.
        return y.contiguous() if x.is_contiguous() else y


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """Layer normalization and its options.

    Attributes:
        over: ``sample`` (moments over C and all positions) or ``channels`` (over C, at each position).
        eps: Added to the variance, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    over: str = "sample"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        options.one_of("layer_norm", "over", self.over, ("sample", "channels"))
        options.number("layer_norm", "eps", self.eps, above=0)

    @property
    def on_tokens(self) -> LayerNorm:
        """The method with moments over the features of each token by itself."""
        return replace(self, over="channels")

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a layer normalization over C channels; it takes any number of spatial axes.

        Raises:
            ConfigError: It would normalize single numbers.
        """
        require_features("layer_norm", num_channels, spatial_dims, over=self.over)
        return (SampleLayerNorm if self.over == "sample" else ChannelLayerNorm)(num_channels, eps=self.eps)


SPEC = NormSpec(
    name="layer_norm",
    summary="y = (x - mean) / sqrt(var + eps) * weight + bias, moments per sample (or per position) over the channels.",
    citation=Citation(
        title="Layer Normalization", authors="Ba, Kiros, Hinton", year=2016, arxiv="1607.06450", where="Equation 3"
    ),
    make=LayerNorm,
    layers=(SampleLayerNorm, nn.LayerNorm),
    tensors={"weight": TensorSpec(Kind.SCALE), "bias": TensorSpec(Kind.SHIFT)},
    verified=(
        "torch.nn.LayerNorm on features, torch.nn.GroupNorm(1, C) on maps",
        "timm's LayerNorm2d (over='channels')",
        "the formula in float64",
    ),
    deviations=(
        "The affine map of a feature map is per channel, so that a network takes any image size; "
        "nn.LayerNorm([C, H, W]), whose affine map is per element, is not offered.",
    ),
)
