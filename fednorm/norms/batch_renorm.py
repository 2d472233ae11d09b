"""Batch renormalization: batch normalization corrected towards the running moments, within bounds that widen.

Ioffe. Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models. NeurIPS 2017.
https://arxiv.org/abs/1702.03275. As in avalanche-lib's ``BatchRenorm2D``, whose traces it reproduces.

    sd = sqrt(var + eps)                                                 of the batch, biased variance
    r  = clamp(sd / running_sd, 1 / r_bound, r_bound)                    constant for the gradient
    d  = clamp((mean - running_mean) / running_sd, -d_bound, d_bound)    constant for the gradient
    y  = ((x - mean) / sd * r + d) * weight + bias
    running <- running + momentum * (batch - running)                    for mean and sd
    evaluation: y = (x - running_mean) / running_sd * weight + bias

r_bound starts at 1 and d_bound at 0, which is batch normalization; each grows by ``growth`` * N with every batch of N
samples that finds it below its maximum, ``r_max`` and ``d_max``, and may overshoot it once, as in Avalanche.

Cost: moments and normalization are two passes, less than twice PyTorch's batch normalization at a batch of 32; at a
batch of 1 the number of calls counts, three times.
Federated: ``running_var`` is the *square* of running_sd, eps included, so that moments can be pooled like any other
variance. The bounds follow from two counters of samples, which each client keeps for itself.
Continual: everything is kept. Avalanche's running moments and bounds are plain attributes, lost on saving; ours are in
the state dict.
Differs: running moments start at mean 0 and variance 1, as batch normalization's. Avalanche's own default, mean 1 and
standard deviation 0, divides by zero in the first step and is rescued by r_bound = 1 and d_bound = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._batch import BatchLayer, batch_norm, check_spatial_dims, per_channel
from fednorm.norms._precision import in_full_precision, widened
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class BatchRenormLayer(BatchLayer):
    """Batch renormalization for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        r_max: Maximum of r_bound.
        d_max: Maximum of d_bound.
        growth: What each bound grows by, per sample.
        eps: Added to the variance.
        momentum: Weight of the new batch in the running moments.
    """

    def __init__(
        self, num_features: int, *, r_max: float, d_max: float, growth: float, eps: float, momentum: float
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.r_max = r_max
        self.d_max = d_max
        self.growth = growth
        # Integers count exactly and never travel; the bounds themselves would be averaged over clients.
        self.r_samples: Tensor
        self.d_samples: Tensor
        self.register_buffer("r_samples", torch.zeros((), dtype=torch.long))
        self.register_buffer("d_samples", torch.zeros((), dtype=torch.long))

    @property
    def r_bound(self) -> float:
        """The bound of r that the next batch meets."""
        return 1.0 + self.growth * int(self.r_samples)

    @property
    def d_bound(self) -> float:
        """The bound of d that the next batch meets."""
        return self.growth * int(self.d_samples)

    def reset_running_stats(self) -> None:
        """Return the running moments, the counters and with them the bounds to their start."""
        super().reset_running_stats()
        if hasattr(self, "r_samples"):  # the base class calls this before they exist
            self.r_samples.zero_()
            self.d_samples.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments and bounds.

        Raises:
            DataError: The input's shape is wrong.
        """
        self._check_input_dim(x)
        if not self.training:
            # running_var has its eps inside.
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.0)
        return self._train(x)

    @in_full_precision
    def _train(self, x: Tensor) -> Tensor:
        mean, sd = self._moments(x)
        r, d = self._correction(mean, sd)
        # r and d are constants, so they go into the scale and shift of PyTorch's own batch norm.
        weight = widened(self.weight)
        shift = torch.addcmul(widened(self.bias), weight, d)
        y = batch_norm(x, None, None, weight * r, shift, True, 0.0, self.eps)
        self._track(mean, sd, len(x))
        return y

    def correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return r and d, shape (C,), that a training forward of ``x`` would have next; changes nothing."""
        return self._correction(*self._moments(widened(x)))

    @torch.no_grad()
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch's mean and sd."""
        axes = (0, *range(2, x.ndim))
        mean = x.mean(axes)
        return mean, ((x - per_channel(mean, x)).square_().mean(axes) + self.eps).sqrt_()

    @torch.no_grad()
    def _correction(self, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
        running_sd = widened(self.running_var).sqrt()
        r = (sd / running_sd).clamp_(1.0 / self.r_bound, self.r_bound)
        return r, ((mean - self.running_mean) / running_sd).clamp_(-self.d_bound, self.d_bound)

    @torch.no_grad()
    def _track(self, mean: Tensor, sd: Tensor, count: int) -> None:
        if self.r_bound < self.r_max:
            self.r_samples.add_(count)
        if self.d_bound < self.d_max:
            self.d_samples.add_(count)
        rate = self.count_batch()
        self.running_mean.copy_(widened(self.running_mean).lerp(mean, rate))
        self.running_var.copy_(widened(self.running_var).sqrt().lerp_(sd, rate).square_())

    def extra_repr(self) -> str:
        """Return the arguments."""
        return (
            f"{self.num_features}, eps={self.eps:g}, r_max={self.r_max:g}, d_max={self.d_max:g}, growth={self.growth:g}"
        )


@dataclass(frozen=True, kw_only=True)
class BatchRenorm(Norm):
    """Batch renormalization and its options, with avalanche-lib's defaults.

    Attributes:
        r_max: Maximum of the bound of r, 1 or more.
        d_max: Maximum of the bound of d, 0 or more.
        growth: What each bound grows by, per sample, greater than 0.
        eps: Added to the variance, greater than 0.
        momentum: Weight of the new batch in the running moments, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    growth: float = 1e-4
    eps: float = 1e-5
    momentum: float = 0.01

    def __post_init__(self) -> None:
        options.number("batch_renorm", "r_max", self.r_max)
        options.number("batch_renorm", "d_max", self.d_max)
        if self.r_max < 1 or self.d_max < 0:
            raise ConfigError(
                f"batch_renorm.r_max must be 1 or more and d_max 0 or more; got {self.r_max!r} and {self.d_max!r}."
            )
        options.number("batch_renorm", "growth", self.growth, above=0)
        options.number("batch_renorm", "eps", self.eps, above=0)
        options.number("batch_renorm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("batch_renorm", spatial_dims)
        return BatchRenormLayer(
            num_channels,
            r_max=self.r_max,
            d_max=self.d_max,
            growth=self.growth,
            eps=self.eps,
            momentum=self.momentum,
        )


SPEC = NormSpec(
    name="batch_renorm",
    summary="y = ((x - mean) / sd * r + d) * weight + bias, r and d pulling towards the running moments.",
    citation=Citation(
        title="Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
        authors="Ioffe",
        year=2017,
        arxiv="1702.03275",
        where="Algorithm 1; the schedule of the bounds as in avalanche-lib's BatchRenorm2D",
    ),
    make=BatchRenorm,
    layers=(BatchRenormLayer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
        "r_samples": TensorSpec(Kind.COUNT),
        "d_samples": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    exact_backward=False,
    deviations=(
        "Running moments start at mean 0 and variance 1; Avalanche's default is mean 1 and standard deviation 0.",
        "Running moments and bounds are in the state dict; Avalanche's are plain attributes.",
    ),
    verified=(
        "Golden traces batchrenorm_avalanche_default, _given: avalanche-lib's BatchRenorm2D, float64.",
        "The formula written out in float64 while its bounds widen; finite differences where r and d rest.",
    ),
)
