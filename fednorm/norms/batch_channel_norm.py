"""Batch-channel normalization: batch normalization, then group normalization, on standardized weights.

Qiao, Wang, Liu, Shen, Yuille. Micro-Batch Training with Batch-Channel Normalization and Weight Standardization.
2019. https://arxiv.org/abs/1903.10520. Official code: joe-siyuan-qiao/Batch-Channel-Normalization.

    u = (x - mean_c) / sqrt(var_c + eps) * weight + bias                      per channel
    y = (u - mean_g) / sqrt(var_g + eps) * group_weight[g] + group_bias[g]    per sample and group, biased variance

``statistics`` says whose mean_c and var_c are, in training:

* ``batch`` (default): the batch's, with running moments for evaluation; PyTorch's batch normalization.
* ``estimate``, for micro-batches: the running ones, once they have moved (s is ``moving_speed``); they are constants
  for the gradient, and evaluation is the same formula.

      running_var  <- (1 - s) running_var + s mean of (x - running_mean)^2     around the mean of before, no n / (n - 1)
      running_mean <- (1 - s) running_mean + s mean of x

Convolutions standardize their weights as in ``ws_group_norm`` (``weight_standardization``).

Federated: running moments are the batch part's. FedBN and SiloBN keep that part apart; the groups' map, which is no
domain's, is averaged by every strategy. Continual: everything is kept.
Differs: two groups by default, as group_norm explains; the official 32 do not divide small widths. The official speed
is 0, a fixed map, until a training loop sets it, which none of the published ones does; ours is 0.01 and constant.
Statistics that are estimated anew (AdaBN) take each batch's variance around its own mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import DataError
from fednorm.norms._batch import BatchLayer, batch_norm, check_spatial_dims, per_channel
from fednorm.norms._precision import in_full_precision, widened
from fednorm.norms.group_norm import checked_groups
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class BatchChannelNormLayer(BatchLayer):
    """Batch-channel normalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        num_groups: Number of groups; it divides C.
        statistics: ``batch`` or ``estimate``.
        eps: Added to both variances.
        momentum: Weight of the new batch in the running moments; the moving speed where they are estimated.
    """

    def __init__(self, num_features: int, *, num_groups: int, statistics: str, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.num_groups = num_groups
        self.statistics = statistics
        self.group_weight = nn.Parameter(torch.ones(num_groups))
        self.group_bias = nn.Parameter(torch.zeros(num_groups))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong, or a group of a sample is a single number.
        """
        self._check_input_dim(x)
        if 0 < x.numel() == len(x) * self.num_groups:
            raise DataError(
                f"{type(self).__name__} with {self.num_groups} groups of {self.num_features} channels meets an input "
                f"of shape {tuple(x.shape)}, one number a group: nothing is left of it. Set num_groups lower, or take "
                "larger images."
            )
        return self._both(x)

    @in_full_precision
    def _both(self, x: Tensor) -> Tensor:
        each = self.num_features // self.num_groups
        scale, shift = (
            widened(tensor)[:, None].expand(-1, each).reshape(-1) for tensor in (self.group_weight, self.group_bias)
        )
        return functional.group_norm(self._first(x), self.num_groups, scale, shift, self.eps)

    def _first(self, x: Tensor) -> Tensor:
        weight, bias = widened(self.weight), widened(self.bias)
        by_batch = self.training and (self.statistics == "batch" or self.momentum is None)
        if self.training and not by_batch:
            self._move(x)
        mean, var = widened(self.running_mean), widened(self.running_var)
        rate = self.count_batch() if by_batch else 0.0
        y = batch_norm(x, mean, var, weight, bias, by_batch, rate, self.eps)
        if mean is not self.running_mean:  # a model in half precision
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return y

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        """Move the running moments towards a batch's, its second moment taken around the running mean of before."""
        axes = (0, *range(2, x.ndim))
        around = (x - per_channel(widened(self.running_mean), x)).square_().mean(axes)
        self.update(x.mean(axes), around, self.count_batch())

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, eps={self.eps:g}, num_groups={self.num_groups}, statistics={self.statistics}"


@dataclass(frozen=True, kw_only=True)
class BatchChannelNorm(Norm):
    """Batch-channel normalization and its options.

    Attributes:
        num_groups: Number of groups; it must divide the number of channels of every layer.
        statistics: ``batch`` or ``estimate``: what the first half normalizes by in training.
        weight_standardization: Whether convolutions standardize their weights, as published.
        moving_speed: s, weight of the new batch in the estimates, in (0, 1]; of ``estimate`` alone.
        eps: Added to both variances, and to that of the weights, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1]; of ``batch`` alone.

    Raises:
        ConfigError: An option is out of range.
    """

    num_groups: int = 2
    statistics: str = "batch"
    weight_standardization: bool = True
    moving_speed: float = 0.01
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.whole("batch_channel_norm", "num_groups", self.num_groups, at_least=1)
        options.one_of("batch_channel_norm", "statistics", self.statistics, ("batch", "estimate"))
        options.flag("batch_channel_norm", "weight_standardization", self.weight_standardization)
        options.number("batch_channel_norm", "moving_speed", self.moving_speed, above=0, at_most=1)
        options.number("batch_channel_norm", "eps", self.eps, above=0)
        options.number("batch_channel_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``num_groups`` does not divide ``num_channels``, features (N, C) have one a group, or
                ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("batch_channel_norm", spatial_dims)
        return BatchChannelNormLayer(
            num_channels,
            num_groups=checked_groups(num_channels, self.num_groups, spatial_dims),
            statistics=self.statistics,
            eps=self.eps,
            momentum=self.momentum if self.statistics == "batch" else self.moving_speed,
        )

    @property
    def conv_layer(self) -> Callable[..., nn.Conv2d]:
        """The standardized convolution; building it raises a ConfigError where the fan-in is 1."""
        return partial(WSConv2d, eps=self.eps) if self.weight_standardization else nn.Conv2d


SPEC = NormSpec(
    name="batch_channel_norm",
    summary="y = group_norm(batch_norm(x)) with a scale and a shift per group, on standardized weights.",
    citation=Citation(
        title="Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        authors="Qiao, Wang, Liu, Shen, Yuille",
        year=2019,
        arxiv="1903.10520",
        where="official code joe-siyuan-qiao/Batch-Channel-Normalization, imagenet/models/layers.py and README.md",
    ),
    make=BatchChannelNorm,
    # Its convolution is ws_group_norm's, which speaks for it.
    layers=(BatchChannelNormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
        # Not of the batch part, which is all that a strategy for normalization layers sets apart.
        "group_weight": TensorSpec(Kind.WEIGHT),
        "group_bias": TensorSpec(Kind.WEIGHT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=(
        "Two groups by default; the official code has 32.",
        "The estimates move at 0.01; the official speed is 0 until a training loop sets it.",
        "Costs about twice nn.BatchNorm2d on a CPU at a batch of 32: it is two normalizations.",
    ),
    verified=(
        "golden traces bcn_batch and bcn_estimate of joe-siyuan-qiao/Batch-Channel-Normalization.",
        "golden trace ws_conv of the same repository, for the convolution.",
        "its formula in float64.",
    ),
)
