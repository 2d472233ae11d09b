"""Weight standardization with group normalization: the convolution's weights and its outputs are both normalized.

Qiao, Wang, Liu, Shen, Yuille. Micro-Batch Training with Batch-Channel Normalization and Weight Standardization.
2019. https://arxiv.org/abs/1903.10520

    w_hat[o] = (w[o] - mean[o]) / sqrt(var[o] + eps)
    y = GN(conv(x, w_hat) + b)

Mean and *unbiased* variance are those of the (C_in / groups) * k_h * k_w entries of output channel o, inside the
forward pass: gradients go through them. There is no gain and no 1 / sqrt(N): outputs grow with the fan-in, and the
group normalization after the convolution is what takes that back. Linear layers stay plain. Train = eval; no buffers.

Federated: the strongest non-federated normalization of FedWSQ's comparison (arXiv 2506.23516, "WS + GN"). The *raw*
weights are sent and averaged. The group normalization's tensors are those of ``group_norm``. FedWS multiplies the
standardized weights by rho = 1e-3, adds 1e-5 to the deviation, and has eps 1e-5 in the group normalization:
``eps_on="deviation"`` and ``group_eps`` 1e-5 / rho^2 = 10 are the same function (the study ``fedws``).
Continual: nothing is carried over but weights, scales and shifts.
Differs: the authors' two public variants put eps under the root (``eps_on="variance"``, ImageNet code, our default)
or add it to the root (``eps_on="deviation"``, DeepLab code). timm's StdConv2d has the biased variance
(``unbiased=false``). Two groups by default, as ``group_norm`` explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.norms._computed import ComputedWeight
from fednorm.norms._precision import widened
from fednorm.norms._rows import centre, composes, normalized_rows
from fednorm.norms.group_norm import GroupNorm
from fednorm.norms.sws import require_fan_in
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec


class WSConv2d(ComputedWeight, nn.Conv2d):
    """A 2-D convolution whose weight is standardized in every forward pass, without any scale.

    Args:
        *args: As of ``nn.Conv2d``.
        eps: Keeps the division finite.
        eps_on: ``variance`` for sqrt(var + eps), ``deviation`` for sqrt(var) + eps.
        unbiased: Whether the variance divides by N - 1 instead of N, the fan-in.
        **kwargs: As of ``nn.Conv2d``.

    Raises:
        ConfigError: The fan-in is 1.
    """

    def __init__(
        self, *args: Any, eps: float = 1e-5, eps_on: str = "variance", unbiased: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fan_in = require_fan_in(self)
        self.eps = eps
        self.eps_on = eps_on
        self.unbiased = unbiased

    def standardized_weight(self) -> Tensor:
        """Return w_hat, shape (C_out, C_in / groups, k_h, k_w)."""
        weight, divisor = widened(self.weight), self.fan_in - int(self.unbiased)
        on_variance = self.eps_on == "variance"
        if on_variance and not composes(weight):
            ratio = self.fan_in / divisor
            w_hat = normalized_rows(weight, None, ratio**-0.5, eps=self.eps / ratio)
            assert w_hat is not None  # there is no least variance
            return w_hat.to(self.weight.dtype)
        centred, length = centre(weight)
        if on_variance:
            scale = (length.square() / divisor + self.eps).rsqrt()
        else:
            scale = (length / math.sqrt(divisor) + self.eps).reciprocal()
        return (centred * scale).view_as(weight).to(self.weight.dtype)

    def computed_weight(self) -> Tensor:
        """Return :meth:`standardized_weight`."""
        return self.standardized_weight()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` of shape (N, C_in, H, W) with the standardized weight."""
        y: Tensor = self._conv_forward(x, self.weight_in_use(), self.bias)
        return y

    def extra_repr(self) -> str:
        """Return the convolution's geometry and this method's settings."""
        geometry: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{geometry}, eps={self.eps:g}, eps_on={self.eps_on}, unbiased={self.unbiased}"


@dataclass(frozen=True, kw_only=True)
class WeightStandardizationGroupNorm(Norm):
    """Weight standardization with group normalization, and the options of both.

    Attributes:
        num_groups: G of the group normalization; it must divide the number of channels of every layer.
        eps: Keeps the weight's division finite, greater than 0.
        eps_on: ``variance`` for sqrt(var + eps), ``deviation`` for sqrt(var) + eps.
        unbiased: Whether the weight's variance divides by N - 1 (the paper's code) instead of N (timm).
        group_eps: eps of the group normalization, greater than 0.

    Raises:
        ConfigError: An option is out of range.
    """

    num_groups: int = 2
    eps: float = 1e-5
    eps_on: str = "variance"
    unbiased: bool = True
    group_eps: float = 1e-5

    def __post_init__(self) -> None:
        options.whole("ws_group_norm", "num_groups", self.num_groups, at_least=1)
        options.number("ws_group_norm", "eps", self.eps, above=0)
        options.one_of("ws_group_norm", "eps_on", self.eps_on, ("variance", "deviation"))
        options.flag("ws_group_norm", "unbiased", self.unbiased)
        options.number("ws_group_norm", "group_eps", self.group_eps, above=0)

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        """Return a group normalization over C channels.

        Raises:
            ConfigError: ``num_groups`` does not divide ``num_channels``.
        """
        return GroupNorm(num_groups=self.num_groups, eps=self.group_eps).layer(num_channels, spatial_dims)

    @property
    def conv_layer(self) -> Callable[..., nn.Conv2d]:
        """The standardized convolution; building it raises a ConfigError where the fan-in is 1."""
        return partial(WSConv2d, eps=self.eps, eps_on=self.eps_on, unbiased=self.unbiased)


SPEC = NormSpec(
    name="ws_group_norm",
    summary="w_hat = (w - mean) / sqrt(var + eps) in every convolution, followed by group normalization.",
    citation=Citation(
        title="Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
        authors="Qiao, Wang, Liu, Shen, Yuille",
        year=2019,
        arxiv="1903.10520",
        where="the weight standardization of Section 3",
    ),
    make=WeightStandardizationGroupNorm,
    # The convolution only: the nn.GroupNorm after it is a normalization layer, and group_norm speaks for it.
    layers=(WSConv2d,),
    convolution=WSConv2d,
    tensors={"weight": TensorSpec(Kind.WEIGHT), "bias": TensorSpec(Kind.WEIGHT)},
    normalizes=False,
    deviations=("Two groups by default, as federated work has it.",),
    verified=(
        "Golden trace ws_conv: the convolutions of the official code and of timm, float64.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
