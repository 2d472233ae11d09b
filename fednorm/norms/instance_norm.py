"""Instance normalization: per sample and channel, over all positions.

Ulyanov, Vedaldi, Lempitsky. Instance Normalization: The Missing Ingredient for Fast Stylization. 2016.
https://arxiv.org/abs/1607.08022

    y = (x - mean_HW) / sqrt(var_HW + eps) * weight + bias

with the biased variance of one channel of one sample. Train = eval; a batch of one works. A map of a single position
has no variance: PyTorch refuses it, so small images and deep networks do not go together here.

Cost: PyTorch's own layer, which takes two to four times as long as its batch normalization on channels-last maps.
Federated: removes each image's own contrast and brightness, which is much of what sets domains apart; no statistics.
Continual: nothing is carried over but the learned scale and shift.
Differs from PyTorch: ``nn.InstanceNorm2d`` has no weight and bias unless asked, so exchanging it for batch
normalization silently loses parameters; ours has them by default, as the paper's generator does.
Features (N, C) have no positions, each value would normalize to 0: there the method falls back to layer normalization.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._features import require_features
from fednorm.norms.layer_norm import SampleLayerNorm
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

_BY_SPATIAL_DIMS: dict[int, type[_InstanceNorm]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


class AnyInstanceNorm(_InstanceNorm):
    """Instance normalization of (N, C, ...) with any number of positions; layer normalization of features (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``."""
        if x.ndim == 2:
            return functional.group_norm(x, 1, self.weight, self.bias, self.eps)
        return functional.instance_norm(x, None, None, self.weight, self.bias, True, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class InstanceNorm(Norm):
    """Instance normalization and its options.

    Attributes:
        eps: Added to the variance, greater than 0.
        affine: Whether feature maps get a learned scale and shift per channel.

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5
    affine: bool = True

    def __post_init__(self) -> None:
        options.number("instance_norm", "eps", self.eps, above=0)
        options.flag("instance_norm", "affine", self.affine)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return PyTorch's own layer, or layer normalization for features without positions (``spatial_dims`` 0).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        if spatial_dims == 0:
            require_features("instance_norm", num_channels, spatial_dims)
            return SampleLayerNorm(num_channels, eps=self.eps)
        if spatial_dims not in _BY_SPATIAL_DIMS:
            raise ConfigError(f"instance_norm is defined for 0 to 3 spatial axes; got {spatial_dims}.")
        return _BY_SPATIAL_DIMS[spatial_dims](num_channels, eps=self.eps, affine=self.affine)

    def layer_for(self, num_channels: int, spatial_dims: Collection[int]) -> nn.Module:
        """Return a layer that sees by its input whether there are positions."""
        layers = [self.layer(num_channels, dims) for dims in spatial_dims]
        if len(layers) == 1:
            return layers[0]
        return AnyInstanceNorm(num_channels, eps=self.eps, affine=self.affine)


SPEC = NormSpec(
    name="instance_norm",
    summary="y = (x - mean_HW) / sqrt(var_HW + eps) * weight + bias, moments per sample and channel.",
    citation=Citation(
        title="Instance Normalization: The Missing Ingredient for Fast Stylization",
        authors="Ulyanov, Vedaldi, Lempitsky",
        year=2016,
        arxiv="1607.08022",
        where="Equation 3",
    ),
    make=InstanceNorm,
    layers=(_InstanceNorm,),
    # Running moments exist only in foreign models, built with track_running_stats=True.
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    deviations=(
        "Affine by default, PyTorch's layer is not.",
        "Features without positions fall back to layer normalization.",
    ),
    verified=(
        "On maps it is torch.nn.InstanceNorm itself.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
