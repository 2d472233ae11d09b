"""FedWon: no normalization at all; every convolution's weight is standardised.

Zhuang, Lyu. FedWon: Triumphing Multi-domain Federated Learning Without Normalization. ICLR 2024.
https://arxiv.org/abs/2306.05879

FedAvg over a network whose normalization layers are deleted and whose convolutions use scaled weight standardization
(norm ``sws``), with adaptive gradient clipping. Every parameter is shared, as its raw value; clients keep nothing.

What the paper leaves open, and what is the default here: the activations are multiplied by the variance-preserving
constant 1.714 (``norm.activation_gain``), and gradients are clipped with lambda 0.64 (``train.agc``), one of the values
associated with its batch size of 32. Without the gain the signal shrinks by 0.341 a layer and training hardly starts.
"""

from __future__ import annotations

from torch import nn

from fednorm.cards import Citation
from fednorm.errors import RoleError
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import NormStrategy
from fednorm.norms import spec_of


class FedWon(NormStrategy):
    """Averages every tensor of a network without normalization layers.

    Raises:
        RoleError: The network has a normalization layer, or a convolution whose weight is not standardised.
    """

    def check(self, model: nn.Module) -> None:
        """Demand that the network is what FedWon is about."""
        for path, module in model.named_modules():
            spec = spec_of(module)
            if spec is not None and spec.normalizes:
                raise RoleError(
                    f"FedWon trains networks without normalization, and {path!r} is a {type(module).__name__} "
                    f"(norm {spec.name!r}). Use norm 'sws', or strategy 'fedavg' for this network."
                )
            if isinstance(module, nn.Conv2d) and spec is None:
                raise RoleError(
                    f"FedWon standardises the weight of every convolution, and {path!r} is a plain "
                    f"{type(module).__name__}. Use norm 'sws' (fednorm.convert(model, 'sws')), or strategy 'fedavg'."
                )


SPEC = StrategySpec(
    name="fedwon",
    summary="FedAvg over a network without normalization layers, its convolutions weight-standardised.",
    citation=Citation(
        title="FedWon: Triumphing Multi-domain Federated Learning Without Normalization",
        authors="Zhuang, Lyu",
        year=2024,
        arxiv="2306.05879",
    ),
    make=FedWon,
    defaults={"norm": {"name": "sws"}, "train": {"agc": 0.64}},
    verified=("It is FedAvg with norm sws, and as verified as these two; no official code was at hand.",),
)
