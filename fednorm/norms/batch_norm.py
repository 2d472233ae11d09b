"""Batch normalization: per channel, over the batch and all positions.

Ioffe, Szegedy. Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift.
ICML 2015. https://arxiv.org/abs/1502.03167

    y = (x - mean) / sqrt(var + eps) * weight + bias                                  (Algorithm 1)
    running_mean <- (1 - momentum) * running_mean + momentum * mean                   (likewise running_var)

Training normalizes with the batch's mean and biased variance (over N, H, W); the running variance stores the unbiased
one, and ``momentum`` is the weight of the *new* batch: PyTorch's conventions. Evaluation uses the running moments.

Federated: the method the whole field argues about. FedAvg averages everything (a mixture's variance is not the mean of
its parts' variances), FedBN keeps all five tensors local, SiloBN only the running moments and their counter.
Continual: everything is kept across experiences, so the running moments favour what came last.
Differs from the paper: running moments are an exponential average instead of a pass over the population.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._batch import BatchLayer
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

_BY_SPATIAL_DIMS: dict[int, type[_BatchNorm]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Norm):
    """Batch normalization and its options.

    Attributes:
        eps: Added to the variance, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.number("batch_norm", "eps", self.eps, above=0)
        options.number("batch_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return PyTorch's own layer for inputs (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        if spatial_dims not in _BY_SPATIAL_DIMS:
            raise ConfigError(f"batch_norm is defined for 0 to 3 spatial axes; got {spatial_dims}.")
        return _BY_SPATIAL_DIMS[spatial_dims](num_channels, eps=self.eps, momentum=self.momentum)

    def layer_for(self, num_channels: int, spatial_dims: Collection[int]) -> nn.Module:
        """Return PyTorch's layer where one takes all those inputs, else one that takes any."""
        kinds = {type(self.layer(num_channels, dims)) for dims in spatial_dims}
        if len(kinds) == 1:
            return self.layer(num_channels, max(spatial_dims))
        return BatchLayer(num_channels, eps=self.eps, momentum=self.momentum)

    def token_layer(self, num_channels: int) -> nn.Module:
        """Return the layer for a transformer's tokens: PyTorch's numbers, by its kernel for rows."""
        return BatchLayer(num_channels, eps=self.eps, momentum=self.momentum)


SPEC = NormSpec(
    name="batch_norm",
    summary="y = (x - mean_NHW) / sqrt(var_NHW + eps) * weight + bias, with running moments for evaluation.",
    citation=Citation(
        title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        authors="Ioffe, Szegedy",
        year=2015,
        arxiv="1502.03167",
        where="Algorithms 1 and 2",
    ),
    make=BatchNorm,
    # The private base is the only ancestor that SyncBatchNorm and the three BatchNorms have in common.
    layers=(_BatchNorm,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=("Running moments are an exponential average, the paper's are a pass over the population.",),
    verified=(
        "It is torch.nn.BatchNorm itself; on a ViT's tokens a subclass that hands them to it as rows.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
