"""No normalization: nothing stands where the layer would.

    y = x

The floor of every comparison, and what FedWon (Zhuang, Lyu; ICLR 2024; https://arxiv.org/abs/2306.05879) is without
its reparameterized weights. Convolutions keep a bias, since no layer after them shifts their output.

Federated: every tensor is a weight. FedBN on such a network is FedAvg, and is refused.
Continual: nothing is carried over but weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fednorm.spec import Citation, Norm, NormSpec


@dataclass(frozen=True, kw_only=True)
class NoNorm(Norm):
    """No normalization. It has no options."""

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> nn.Conv2d:
        """Return a plain convolution that has a bias whatever ``bias`` says."""
        del bias
        return super().conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=True,
            padding_mode=padding_mode,
        )


SPEC = NormSpec(
    name="none",
    summary="y = x: no normalization layer, a bias on every convolution.",
    citation=Citation(
        title="Normalization Is Not All You Need: Federated Learning Without Normalizations",
        authors="Zhuang, Lyu",
        year=2024,
        arxiv="2306.05879",
        where="the unnormalized network",
    ),
    make=NoNorm,
    tensors={},
    normalizes=False,
)
