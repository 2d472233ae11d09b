"""FedAvgM: FedAvg with momentum on the server, over the learned tensors only.

Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. 2019.
https://arxiv.org/abs/1909.06335

    d = w_t - mean_k w_k;   v <- beta v + d;   w_{t+1} = w_t - eta v

Running statistics and counters are averaged as in FedAvg: momentum could drive a running variance below zero. Flower's
FedAvgM has a momentum of 0 until it is set, which is FedAvg; here the default is 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.server_optimizer import ServerOptimizer
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common


class FedAvgM(ServerOptimizer):
    """Averages every tensor, and moves the learned ones by a momentum.

    Args:
        model: The network.
        server_learning_rate: eta.
        server_momentum: beta, in [0, 1).
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range.
    """

    slots = ("velocity",)

    def __init__(
        self,
        model: nn.Module,
        *,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.9,
        **common: Unpack[Common],
    ) -> None:
        if server_learning_rate <= 0 or not 0 <= server_momentum < 1:
            raise ConfigError(
                "strategy.server_learning_rate must be positive and strategy.server_momentum in [0, 1); "
                f"got {server_learning_rate} and {server_momentum}."
            )
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum
        super().__init__(model, **common)

    def update(self, old: Tensor, mean: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return the next value of one tensor; its velocity is updated in place."""
        delta = old - mean
        velocity = slots["velocity"].mul_(self.server_momentum).add_(delta)
        # old - eta v, written so that momentum 0 and learning rate 1 give the average to the last bit
        return mean + (delta - self.server_learning_rate * velocity)


SPEC = StrategySpec(
    name="fedavgm",
    summary="FedAvg with momentum on the server, over the learned tensors only.",
    citation=Citation(
        title="Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        authors="Hsu, Qi, Brown",
        year=2019,
        arxiv="1909.06335",
    ),
    make=FedAvgM,
    verified=("Five rounds against the published formula in float64.",),
)
