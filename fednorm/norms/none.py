"""No normalization: nothing stands where the layer would.

    y = x

The floor of every comparison, and what FedWon (Zhuang, Lyu; ICLR 2024; https://arxiv.org/abs/2306.05879) is without
its reparameterized weights. Convolutions keep a bias, since no layer after them shifts their output.

Federated: every tensor is a weight. FedBN on such a network is FedAvg, and is refused.
Continual: nothing is carried over but weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from fednorm.cards import Citation
from fednorm.spec import Norm, NormSpec


@dataclass(frozen=True, kw_only=True)
class NoNorm(Norm):
    """No normalization. It has no options."""

    @property
    def shifts(self) -> bool:
        """Return False: every convolution has a bias."""
        return False


SPEC = NormSpec(
    name="none",
    summary="y = x: no normalization layer, a bias on every convolution.",
    citation=Citation(
        title="FedWon: Triumphing Multi-domain Federated Learning Without Normalization",
        authors="Zhuang, Lyu",
        year=2024,
        arxiv="2306.05879",
        where="the unnormalized network",
    ),
    make=NoNorm,
    tensors={},
    normalizes=False,
    scale_invariant=False,
    verified=("There is nothing to verify: it leaves the network as it is.",),
)
