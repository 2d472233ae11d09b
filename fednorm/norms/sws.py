"""Scaled weight standardization: the convolution's weights are normalized, its outputs are not.

Brock, De, Smith. Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets. ICLR 2021.
https://arxiv.org/abs/2101.08692. In FedWon: Zhuang, Lyu. ICLR 2024. https://arxiv.org/abs/2306.05879 (Equation 1).

    w_hat[o] = gain[o] * (w[o] - mean[o]) / sqrt(max(var[o] * N, eps)),     N = (C_in / groups) * k_h * k_w
    y = conv(x, w_hat) + b,      activation(h) = gamma * f(h)

Mean and variance are those of the N entries of output channel o, inside the forward pass: gradients go through them.
gamma makes the nonlinearity f keep the variance of a standard normal input. Convolutions only: linear layers stay
plain, every normalization layer is gone. Train = eval; no buffers; a batch of one works.

Federated: every tensor is shared and no statistic exists, which is FedWon. The *raw* weights are sent and averaged.
Continual: nothing is carried over but weights.
Differs: the public implementations disagree, and our defaults are DeepMind's (``nfnets/base.py``): biased variance, a
*floor* of 1e-4 under var * N. ``unbiased=true`` gives benjs/nfnets_pytorch, which FedWon most likely used;
``floor="add", eps=1e-6`` gives timm, which adds eps to the variance. FedWon does not say whether its activations
carry gamma: ``activation_gain`` is the switch. The gammas are DeepMind's, about 0.05 % above the exact values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.norms._computed import ComputedWeight
from fednorm.norms._precision import LOW, widened
from fednorm.norms._rows import centre, composes, normalized_rows
from fednorm.norms._transforms import transforms_active
from fednorm.roles import Kind
from fednorm.scalar import scalar
from fednorm.spec import Norm, NormSpec, TensorSpec

GAMMA: Mapping[str, float] = {
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "gelu": 1.7015043497085571,
    "silu": 1.7881293296813965,
    "elu": 1.2716004848480225,
    "tanh": 1.5939117670059204,
    "leaky_relu": 1.70590341091156,
    "selu": 1.0008515119552612,
    "identity": 1.0,
}
"""1 / standard deviation of f(z) for standard normal z, as estimated in DeepMind's ``nfnets/base.py``."""


class SWSConv2d(ComputedWeight, nn.Conv2d):
    """A 2-D convolution whose weight is standardized and scaled by the fan-in in every forward pass.

    Args:
        *args: As of ``nn.Conv2d``.
        eps: Lower bound of var * N (``floor="max"``), or a summand of var (``floor="add"``).
        floor: ``max`` or ``add``.
        unbiased: Whether the variance divides by N - 1 instead of N.
        gain: Whether each output channel has a learned gain, shape (C_out, 1, 1, 1).
        **kwargs: As of ``nn.Conv2d``.

    Raises:
        ConfigError: The fan-in N is 1: the only entry minus its mean is 0, whatever is learned.
    """

    def __init__(
        self,
        *args: Any,
        eps: float = 1e-4,
        floor: str = "max",
        unbiased: bool = False,
        gain: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.floor = floor
        self.unbiased = unbiased
        self.fan_in = require_fan_in(self)
        shape = (self.out_channels, 1, 1, 1)
        self.gain = nn.Parameter(self.weight.new_ones(shape)) if gain else None

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution of variance 1 / N and set the bias to 0 (DeepMind's)."""
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="linear")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def standardized_weight(self) -> Tensor:
        """Return w_hat, shape (C_out, C_in / groups, k_h, k_w)."""
        if self.weight.dtype in LOW:
            gain = None if self.gain is None else widened(self.gain)
            return self._standardized(widened(self.weight), gain).to(self.weight.dtype)
        return self._standardized(self.weight, self.gain)

    def _standardized(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        """Return the standardized weight of single or double precision."""
        n, floor = self.fan_in, self.floor == "max"
        ratio = n / (n - 1) if self.unbiased else 1.0  # of the variance that counts to the biased one
        if not composes(weight):
            factor = (ratio * n) ** -0.5
            w_hat = (
                normalized_rows(weight, gain, factor, least=self.eps * factor**2)
                if floor
                else normalized_rows(weight, gain, factor, eps=self.eps / ratio)
            )
            if w_hat is not None:
                return w_hat
        centred, length = centre(weight)
        energy = length.square() if ratio == 1.0 else length.square() * ratio
        inverse = (energy.clamp_min(self.eps) if floor else energy + self.eps * n).rsqrt()
        if gain is not None:
            inverse = inverse * gain.flatten(1)
        return (centred * inverse).view_as(weight)

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
        return f"{geometry}, eps={self.eps:g}, floor={self.floor}, unbiased={self.unbiased}"


def require_fan_in(conv: nn.Conv2d) -> int:
    """Return the fan-in N of a convolution whose weight is to be standardized.

    Raises:
        ConfigError: N is 1.
    """
    fan_in = math.prod(conv.weight.shape[1:])
    if fan_in == 1:
        raise ConfigError(
            "A standardized convolution needs two or more weights per output channel, or all its outputs are 0; got "
            f"weight shape {tuple(conv.weight.shape)}. Use a larger kernel or fewer groups there, or another norm."
        )
    return fan_in


class _ScaledReLU(torch.autograd.Function):
    """gamma * max(x, 0), written where the maximum was: a map's second pass through memory takes as long as its first.

    The derivative needs the output alone, which is positive where the input was.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: float) -> Tensor:
        y = torch.relu(x)
        y *= scalar(gamma, y)
        ctx.save_for_backward(y)
        ctx.gamma = gamma
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this too
            return torch.where(y > 0, grad, 0.0) * ctx.gamma, None
        passed: Tensor = torch.ops.aten.threshold_backward(grad, y, 0)
        passed *= scalar(ctx.gamma, passed)
        return passed, None


_LARGE = 2**15
"""Values of a map from which :class:`_ScaledReLU` pays: below, an operation costs more than its arithmetic."""

_SMALL = 2**12
"""Values of a map up to which ELU pays, whose scale is gamma and whose branch of negative values is 0: one operation,
that computes an exponential for each value. It may leave -0 where ReLU leaves 0, and differentiates NaN to NaN."""


def _is_plain_relu(module: nn.Module) -> bool:
    """Return whether calling a module is ``torch.relu`` and nothing else: no hook sees what goes in and comes out."""
    if type(module) is not nn.ReLU or module.inplace or "forward" in vars(module):
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class ScaledActivation(nn.Module):
    """A nonlinearity multiplied by a constant: y = gamma * f(x).

    Args:
        activation: f.
        gamma: The constant.
    """

    def __init__(self, activation: nn.Module, gamma: float) -> None:
        super().__init__()
        self.activation = activation
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return gamma * f(x), of the shape of ``x``."""
        if not _is_plain_relu(self.activation) or torch.compiler.is_compiling() or transforms_active():
            of_any: Tensor = self.activation(x) * self.gamma
            return of_any
        learning = x.requires_grad and torch.is_grad_enabled()
        if learning and x.numel() >= _LARGE:
            scaled: Tensor = _ScaledReLU.apply(x, self.gamma)
            return scaled
        if learning and x.numel() <= _SMALL and x.device.type == "cpu":
            of_few: Tensor = torch.ops.aten.elu(x, 0.0, self.gamma, 1.0)
            return of_few
        y = torch.relu(x)
        factor = scalar(self.gamma, y)
        return y * factor if learning else y.mul_(factor)

    def extra_repr(self) -> str:
        """Return the constant."""
        return f"gamma={self.gamma:g}"


@dataclass(frozen=True, kw_only=True)
class ScaledWeightStandardization(Norm):
    """Scaled weight standardization and its options.

    Attributes:
        eps: Lower bound of var * N (``floor="max"``), or a summand of var (``floor="add"``; timm has 1e-6), above 0.
        floor: ``max`` (DeepMind) or ``add`` (timm).
        unbiased: Whether the variance divides by N - 1 (benjs/nfnets_pytorch) instead of N (DeepMind, timm).
        gain: Whether each output channel has a learned gain.
        activation_gain: Whether nonlinearities are multiplied by their gamma.
        alpha: Scale of a residual branch in residual networks, 0 or more; 0 leaves an ordinary residual sum.

    Raises:
        ConfigError: An option is out of range.
    """

    eps: float = 1e-4
    floor: str = "max"
    unbiased: bool = False
    gain: bool = True
    activation_gain: bool = True
    alpha: float = 0.2

    def __post_init__(self) -> None:
        options.number("sws", "eps", self.eps, above=0)
        options.one_of("sws", "floor", self.floor, ("max", "add"))
        options.flag("sws", "unbiased", self.unbiased)
        options.flag("sws", "gain", self.gain)
        options.flag("sws", "activation_gain", self.activation_gain)
        options.number("sws", "alpha", self.alpha)
        if self.alpha < 0:
            raise ConfigError(f"sws.alpha scales a residual branch and must be 0 (off) or more; got {self.alpha!r}.")

    @property
    def conv_layer(self) -> Callable[..., nn.Conv2d]:
        """The standardized convolution; building it raises a ConfigError where the fan-in is 1."""
        return partial(SWSConv2d, eps=self.eps, floor=self.floor, unbiased=self.unbiased, gain=self.gain)

    @property
    def shifts(self) -> bool:
        """Return False: no normalization layer follows, so every convolution has a bias."""
        return False

    def activation(self, name: str = "relu") -> nn.Module:
        """Return the nonlinearity called ``name``, multiplied by its gamma where ``activation_gain`` is on."""
        plain = super().activation(name)
        gamma = GAMMA[name] if self.activation_gain else 1.0
        return plain if gamma == 1.0 else ScaledActivation(plain, gamma)

    @property
    def residual_alpha(self) -> float | None:
        """The NF residual scale alpha, or None where it is switched off."""
        return self.alpha or None


SPEC = NormSpec(
    name="sws",
    summary="w_hat = gain * (w - mean) / sqrt(max(var * N, eps)) in every convolution; nothing normalizes activations.",
    citation=Citation(
        title="Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets",
        authors="Brock, De, Smith",
        year=2021,
        arxiv="2101.08692",
        where="Equation 1; in FedWon (arXiv 2306.05879) Equation 1",
    ),
    make=ScaledWeightStandardization,
    layers=(SWSConv2d,),
    convolution=SWSConv2d,
    tensors={
        "weight": TensorSpec(Kind.WEIGHT),
        "bias": TensorSpec(Kind.WEIGHT),
        "gain": TensorSpec(Kind.GAIN),
    },
    normalizes=False,
    deviations=(
        "A floor of 1e-4 under var * N and the biased variance, as DeepMind's code has it; the paper has no eps.",
        "Activation constants are DeepMind's Monte-Carlo estimates (ReLU 1.71396; exact 1.71286).",
    ),
    verified=(
        "Golden traces scaled_ws_timm, scaled_ws_nfnets, scaled_ws_deepmind: three implementations, float64.",
        "The formula written out in float64, on drawn maps and features, with finite differences of its gradient.",
    ),
)
