"""L1 normalization: the mean absolute deviation takes the place of the standard deviation.

In: Towards Accurate and Efficient Sub-8-Bit Integer Training (ShiftQuant). 2024. https://arxiv.org/abs/2411.10948; the
formula: Wu, Li, Deng, Liu, Xie, Shi. L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks. 2018.
https://arxiv.org/abs/1802.09769

    s = sqrt(pi / 2) * mean|x - mean(x)|,      y = (x - mean(x)) / (s + eps) * weight + bias

For Gaussian numbers s is the standard deviation; outliers count less in it. ``weight`` and ``bias`` are per channel,
shape (C,). The option ``over`` says what the means are over:

* ``batch`` (default): each channel over the batch and all positions, as batch normalization. In training running
  averages of the mean and of s are kept, ``running <- (1 - momentum) * running + momentum * batch``, first 0 and 1;
  evaluation uses them.
* ``sample``: (C, H, W) of one sample; ``channels``: C at each position of a sample. Train = eval; no running
  statistics; a batch of one works.

Federated: ``batch`` is averaged by FedAvg (the mean of clients' s ignores that their means differ, as with variances),
its statistics are local under SiloBN, all of it under FedBN. The other forms have only the scale and shift.
Continual: the running statistics of ``batch`` forget as batch normalization's do.
Differs: the exact layer of the sub-8-bit paper could not be read, so that this is the established one. Its quantizer is
no part of this. The card says what holds of ``batch``; the other forms' samples do not depend on one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import DataError
from fednorm.norms._batch import check_spatial_dims, per_channel
from fednorm.norms._features import require_channels, require_features, require_numbers
from fednorm.norms._precision import in_full_precision, widened
from fednorm.roles import Carry, Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

GAUSSIAN = math.sqrt(math.pi / 2)
"""Standard deviation over mean absolute deviation, of a Gaussian."""

OVER = ("batch", "sample", "channels")


def l1_moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return x - mean(x), mean(x), and s = sqrt(pi / 2) * mean|x - mean(x)|; means keep their axes, of length 1."""
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    return centred, mean, GAUSSIAN * centred.abs().mean(axes, keepdim=True)


class L1Layer(nn.Module):
    """What the forms of L1 normalization have in common: C, eps, and a learned scale and shift per channel."""

    def __init__(self, num_channels: int, *, eps: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def affine(self, centred: Tensor, deviation: Tensor) -> Tensor:
        """Return centred / (deviation + eps) * weight + bias."""
        scale = per_channel(self.weight, centred) / (deviation + self.eps)
        return torch.addcmul(per_channel(self.bias, centred), centred, scale)


class L1BatchNorm(L1Layer):
    """L1 normalization of each channel of (N, C) and (N, C, ...) over the batch and all positions.

    Args:
        num_channels: C.
        eps: Added to s.
        momentum: Weight of the new batch in the running averages.
    """

    over = "batch"

    def __init__(self, num_channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_channels, eps=eps)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_deviation", torch.ones(num_channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.running_mean: Tensor
        self.running_deviation: Tensor
        self.num_batches_tracked: Tensor

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong, or training has one value per channel.
        """
        require_channels(self, self.num_channels, x)
        if not self.training:
            mean, deviation = (per_channel(widened(t), x) for t in (self.running_mean, self.running_deviation))
            return self.affine(x - mean, deviation)
        if x.numel() <= self.num_channels:
            raise DataError(
                f"{type(self).__name__} estimates a deviation from each batch and needs more than one value per "
                f"channel; got shape {tuple(x.shape)}. Use a batch size of at least 2, drop the last batch, or call "
                "model.eval()."
            )
        centred, mean, deviation = l1_moments(x, (0, *range(2, x.ndim)))
        self._update(mean, deviation)
        return self.affine(centred, deviation)

    @torch.no_grad()
    def _update(self, mean: Tensor, deviation: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        for running, batch in ((self.running_mean, mean), (self.running_deviation, deviation)):
            running.copy_(widened(running).lerp(batch.flatten(), self.momentum))

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, eps={self.eps:g}, momentum={self.momentum:g}"


class L1LayerNorm(L1Layer):
    """L1 normalization of each sample of (N, C) and (N, C, ...) by itself.

    Args:
        num_channels: C.
        over: ``sample`` (all of a sample) or ``channels`` (C at each position).
        eps: Added to s.
    """

    batch_coupled = False
    """Unlike the form that the card speaks of."""

    def __init__(self, num_channels: int, *, over: str = "sample", eps: float = 1e-5) -> None:
        super().__init__(num_channels, eps=eps)
        self.over = over

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong, or a sample is a single number.
        """
        require_channels(self, self.num_channels, x)
        if self.num_channels == 1:
            require_numbers("l1_norm", x)
        centred, _, deviation = l1_moments(x, (1,) if self.over == "channels" else tuple(range(1, x.ndim)))
        return self.affine(centred, deviation)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_channels}, over={self.over}, eps={self.eps:g}"


@dataclass(frozen=True, kw_only=True)
class L1Norm(Norm):
    """L1 normalization and its options.

    Attributes:
        over: ``batch`` (each channel over batch and positions), ``sample`` (C and all positions of a sample) or
            ``channels`` (C at each position of a sample).
        eps: Added to s, greater than 0.
        momentum: Weight of the new batch in the running averages of ``batch``, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    over: str = "batch"
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.one_of("l1_norm", "over", self.over, OVER)
        options.number("l1_norm", "eps", self.eps, above=0)
        options.number("l1_norm", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return an L1 normalization of C channels; it takes any number of spatial axes.

        Raises:
            ConfigError: It would normalize single numbers.
        """
        if self.over == "batch":
            check_spatial_dims("l1_norm", spatial_dims)
            return L1BatchNorm(num_channels, eps=self.eps, momentum=self.momentum)
        require_features("l1_norm", num_channels, spatial_dims, over=self.over)
        return L1LayerNorm(num_channels, over=self.over, eps=self.eps)


SPEC = NormSpec(
    name="l1_norm",
    summary="y = (x - mean) / (sqrt(pi/2) * mean|x - mean| + eps) * weight + bias, over the batch (or each sample).",
    citation=Citation(
        title="L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks",
        authors="Wu, Li, Deng, Liu, Xie, Shi",
        year=2018,
        arxiv="1802.09769",
        where="for the L1 layers of arXiv 2411.10948",
    ),
    make=L1Norm,
    layers=(L1Layer,),
    tensors={
        "weight": TensorSpec(Kind.SCALE, Carry.KEEP),
        "bias": TensorSpec(Kind.SHIFT, Carry.KEEP),
        "running_mean": TensorSpec(Kind.MEAN, Carry.KEEP),
        "running_deviation": TensorSpec(Kind.DEVIATION, Carry.KEEP),
        "num_batches_tracked": TensorSpec(Kind.COUNT, Carry.KEEP),
    },
    batch_coupled=True,
    train_eval_differ=True,
    verified=("the formula in float64, and its gradient written out", "batch normalization of Gaussian numbers, nearly"),
    reconstruction="The exact L1 layer of arXiv 2411.10948; this is that of arXiv 1802.09769.",
)
