"""Vectors with zero mean over their features, and the layers that give and take them: the exact Pre-RMSNorm rewrite.

Jiang, Gu, Zhu, Pan. Pre-RMSNorm and Pre-CRMSNorm Transformers. NeurIPS 2023. https://arxiv.org/abs/2305.14858

    W <- W - mean_out(W),   b <- b - mean(b)          a layer whose output has zero mean
    x -> (x_1 ... x_{d-1})                            such a vector, stored: the last entry is minus the others' sum

Both are done within the forward pass: the parameters stay as they are, and so do their gradients and updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm.norms._computed import ComputedWeight
from fednorm.norms._precision import in_full_precision
from fednorm.norms.crms_norm import CRMSNormLayer, inverse_crms
from fednorm.recognition.tensor_kinds import declare_tensors
from fednorm.roles import Kind


def zero_mean(x: Tensor, dim: int = -1) -> Tensor:
    """Return x minus its mean over an axis."""
    return x - x.mean(dim, keepdim=True)


def stored(x: Tensor, dim: int = -1) -> Tensor:
    """Return all entries of an axis but the last."""
    return x.narrow(dim, 0, x.shape[dim] - 1)


def whole(x: Tensor) -> Tensor:
    """Return the vectors with zero mean of which all entries but the last are stored, over the last axis."""
    return torch.cat([x, -x.sum(-1, keepdim=True)], -1)


def centred(x: Tensor, dim: int, *, shorten: bool) -> Tensor:
    """Return x minus its mean over an axis, with ``shorten`` as it is stored."""
    x = zero_mean(x, dim)
    return stored(x, dim) if shorten else x


class ZeroMeanLinear(ComputedWeight, nn.Linear):
    """A linear layer whose output has zero mean: y = x W'^T + b' with W and b minus their means over the outputs.

    Args:
        in_features: Features in.
        out_features: Features out.
        bias: Whether there is a bias.
        shorten: Whether the last output, minus the others' sum, is left out.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, shorten: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.shorten = shorten

    def computed_weight(self) -> Tensor:
        """Return W', shape (C_out, C_in), or (C_out - 1, C_in)."""
        return centred(self.weight, 0, shorten=self.shorten)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out), or (..., C_out - 1)."""
        bias = None if self.bias is None else centred(self.bias, 0, shorten=self.shorten)
        return F.linear(input, self.weight_in_use(), bias)


class ZeroMeanConv2d(ComputedWeight, nn.Conv2d):
    """A 2-D convolution, of one group, whose output channels have zero mean at each position; as ZeroMeanLinear.

    Made of an ``nn.Conv2d`` by giving it this class and ``shorten``.
    """

    shorten: bool

    def computed_weight(self) -> Tensor:
        """Return W', shape (C_out, C_in, k_h, k_w), or one channel less."""
        return centred(self.weight, 0, shorten=self.shorten)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, C_in, H, W)."""
        bias = None if self.bias is None else centred(self.bias, 0, shorten=self.shorten)
        y: Tensor = self._conv_forward(input, self.weight_in_use(), bias)
        return y


@dataclass(frozen=True)
class ZeroMeanOutput:
    """A forward hook that takes the mean over the features, the last axis, off a module's (first) output.

    Attributes:
        shorten: Whether the last feature is left out.
    """

    shorten: bool

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with zero mean."""
        del module, args
        if isinstance(output, tuple):
            return (centred(output[0], -1, shorten=self.shorten), *output[1:])
        return centred(output, -1, shorten=self.shorten)


@dataclass(frozen=True)
class ZeroMeanInput:
    """A forward pre-hook, given keyword arguments, that takes the mean over the features off a module's first input.

    Attributes:
        shorten: Whether the last feature is left out.
    """

    shorten: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, the first with zero mean."""
        del module
        if args:
            return (centred(args[0], -1, shorten=self.shorten), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: centred(kwargs[name], -1, shorten=self.shorten)}


class TokenRMSNorm(nn.RMSNorm):
    """RMS normalization over the last axis with the scale and shift of the layer normalization that it stands for.

    Args:
        features: d.
        eps: Added to the mean square.
    """

    channels_last = True

    def __init__(self, features: int, *, eps: float) -> None:
        super().__init__(features, eps=eps)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(features))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input (..., d), of the same shape."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        y = F.rms_norm(x, tuple(self.normalized_shape), weight, self.eps)
        return y if self.bias is None else y + self.bias


class TokenCRMSNorm(CRMSNormLayer):
    """CRMS normalization over the last axis, from d - 1 stored entries to all d, then scaled and shifted.

    Args:
        features: d.
        eps: Added to the mean square.
    """

    channels_last = None
    """It gives out other features than it takes, so that no other norm can take its place."""

    def __init__(self, features: int, *, eps: float) -> None:
        super().__init__(features, eps=eps)
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(features))

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input (..., d) of an input (..., d - 1)."""
        y = whole(x * inverse_crms(x, -1, self.eps))
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


declare_tensors(TokenRMSNorm, bias=Kind.SHIFT)
declare_tensors(TokenCRMSNorm, bias=Kind.SHIFT)
