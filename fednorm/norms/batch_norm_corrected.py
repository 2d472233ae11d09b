"""Batch normalization with a smaller, bias-corrected momentum: the control for AdaB2N's adaptive momentum.

Ioffe, Szegedy. Batch Normalization. ICML 2015. https://arxiv.org/abs/1502.03167, with the correction of Kingma, Ba.
Adam. ICLR 2015. https://arxiv.org/abs/1412.6980 (Section 3), applied to the running moments.

    y       = (x - mean) / sqrt(var + eps) * weight + bias
    b       = (1 - momentum)^kappa
    eta_t   = (1 - b) / (1 - b^t)                              kappa = 0: 1 / t
    running <- (1 - eta_t) running + eta_t batch

After t batches the one s batches ago has a weight proportional to b^s, and the initial values have none. AdaB2N's
modified momentum (arXiv 2310.08855) is this but for a residue of the initial values, so what AdaB2N adds to *this* is
its task weighting and its loss. The limit of eta_t is 1 - (1 - momentum)^kappa: 0.0413 for kappa 0.4 and momentum 0.1.

Everything else is PyTorch's batch normalization: same tensors, unbiased running variance. It is a method of its own,
and not an option of batch_norm, so that batch_norm's configurations, records and layers stay what they are.

Federated: as batch normalization; each client counts its own batches. Continual: everything is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._batch import BatchLayer, batch_norm, check_spatial_dims
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


def corrected_momentum(step: int, momentum: float, kappa: float) -> float:
    """Return eta_t = (1 - b) / (1 - b^t) with b = (1 - momentum)^kappa.

    Args:
        step: t, from 1.
        momentum: In (0, 1].
        kappa: In [0, 1].
    """
    base = (1.0 - momentum) ** kappa
    return 1.0 / step if base == 1.0 else (1.0 - base) / (1.0 - base**step)


class CorrectedBatchNorm(BatchLayer):
    """Batch normalization with a bias-corrected momentum for (N, C) and (N, C, ...).

    Args:
        num_features: C.
        kappa: Exponent of 1 - momentum.
        eps: Added to the variance.
        momentum: Before the exponent.
    """

    def __init__(self, num_features: int, *, kappa: float, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.kappa = kappa

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, of the shape of ``x``; training updates the running moments.

        Raises:
            DataError: The input's shape is wrong.
        """
        self._check_input_dim(x)
        rate = self.count_batch() if self.training else 0.0
        if self.training and self.momentum is not None:
            rate = corrected_momentum(int(self.num_batches_tracked), self.momentum, self.kappa)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, rate, self.eps)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"{self.num_features}, eps={self.eps:g}, kappa={self.kappa:g}"


@dataclass(frozen=True, kw_only=True)
class BatchNormCorrected(Norm):
    """Batch normalization with a bias-corrected momentum, and its options.

    Attributes:
        kappa: In [0, 1]: 0 averages all batches alike, 1 is ``momentum`` with bias correction.
        eps: Added to the variance, greater than 0.
        momentum: Weight of the new batch for kappa 1 and many batches, in (0, 1].

    Raises:
        ConfigError: An option is out of range.
    """

    kappa: float = 0.4
    eps: float = 1e-5
    momentum: float = 0.1

    def __post_init__(self) -> None:
        options.number("batch_norm_corrected", "kappa", self.kappa, at_most=1)
        if self.kappa < 0:
            raise ConfigError(f"batch_norm_corrected.kappa must be 0 or more; got {self.kappa!r}.")
        options.number("batch_norm_corrected", "eps", self.eps, above=0)
        options.number("batch_norm_corrected", "momentum", self.momentum, above=0, at_most=1)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return the layer for inputs (N, C) and (N, C, ...).

        Raises:
            ConfigError: ``spatial_dims`` is not 0, 1, 2 or 3.
        """
        check_spatial_dims("batch_norm_corrected", spatial_dims)
        return CorrectedBatchNorm(num_channels, kappa=self.kappa, eps=self.eps, momentum=self.momentum)


SPEC = NormSpec(
    name="batch_norm_corrected",
    summary="Batch norm with running moments of bias-corrected momentum 1 - (1 - momentum)^kappa: AdaB2N's control.",
    citation=Citation(
        title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        authors="Ioffe, Szegedy",
        year=2015,
        arxiv="1502.03167",
        where="the bias correction: Kingma, Ba, arXiv 1412.6980, Section 3",
    ),
    make=BatchNormCorrected,
    layers=(CorrectedBatchNorm,),
    tensors={
        "weight": TensorSpec(Kind.SCALE),
        "bias": TensorSpec(Kind.SHIFT),
        "running_mean": TensorSpec(Kind.MEAN),
        "running_var": TensorSpec(Kind.VAR),
        "num_batches_tracked": TensorSpec(Kind.COUNT),
    },
    batch_coupled=True,
    train_eval_differ=True,
    deviations=("A control of ours, not a published method.",),
    verified=(
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
        "Running moments against the geometric weights that they stand for, in float64.",
    ),
)
