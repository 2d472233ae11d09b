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

Cost: some elementwise passes and two reductions, each read and written; PyTorch's layer and batch
normalization, one fused kernel each on a CPU, take a half to a tenth of its time.
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
from fednorm.norms._batch import BatchLayer, check_spatial_dims, per_channel
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
    """What marks the layers of L1 normalization."""

    weight: nn.Parameter
    bias: nn.Parameter
    eps: float

    def _scaled(self, centred: Tensor, deviation: Tensor) -> Tensor:
        """Return centred / (deviation + eps) * weight + bias."""
        scale = per_channel(self.weight, centred) / (deviation + self.eps)
        return torch.addcmul(per_channel(self.bias, centred), centred, scale)


class L1BatchNorm(L1Layer, BatchLayer):
    """L1 normalization of each channel of (N, C) and (N, C, ...) over the batch and all positions.

    Args:
        num_features: C.
        eps: Added to s.
        momentum: Weight of the new batch in the running averages. None averages all batches alike, as in PyTorch.
    """

    over = "batch"

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        del self.running_var  # PyTorch's buffer: the property takes its place
        self.register_buffer("running_deviation", torch.ones(num_features))
        self.running_deviation: Tensor

    @property
    def running_var(self) -> Tensor:  # type: ignore[override]
        """The running s, squared: what a Gaussian with that deviation has for a variance."""
        return self.running_deviation.square()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running s to 1, and the count of batches to 0."""
        if "running_deviation" in self._buffers:  # not yet while PyTorch's layer is being made
            self.running_mean.zero_()
            self.running_deviation.fill_(1)
            self.num_batches_tracked.zero_()

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``.

        Raises:
            DataError: The input's shape is wrong, or training has one value per channel.
        """
        self._check_input_dim(x)
        if not self.training:
            mean, deviation = (per_channel(widened(t), x) for t in (self.running_mean, self.running_deviation))
            return self._scaled(x - mean, deviation)
        centred, mean, deviation = l1_moments(x, (0, *range(2, x.ndim)))
        self._update(mean, deviation)
        return self._scaled(centred, deviation)

    @torch.no_grad()
    def _update(self, mean: Tensor, deviation: Tensor) -> None:
        rate = self.count_batch()
        for running, batch in ((self.running_mean, mean), (self.running_deviation, deviation)):
            running.copy_(widened(running).lerp(batch.flatten(), rate))


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
        super().__init__()
        self.num_channels = num_channels
        self.over = over
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

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
        return self._scaled(centred, deviation)

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
    verified=(
        "the formula in float64, and its gradient written out",
        "batch normalization of Gaussian numbers, nearly",
    ),
    reconstruction="The exact L1 layer of arXiv 2411.10948; this is that of arXiv 1802.09769.",
)
