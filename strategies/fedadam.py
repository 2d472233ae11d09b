"""FedAdam: an adaptive server optimizer over the learned tensors only.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. Adaptive Federated Optimization. ICLR 2021.
https://arxiv.org/abs/2003.00295, Algorithm 2

    d = mean_k w_k - w_t
    m <- beta_1 m + (1 - beta_1) d
    v <- beta_2 v + (1 - beta_2) d^2            v starts at tau^2
    w_{t+1} = w_t + eta m / (sqrt(v) + tau)

Running statistics and counters are averaged as in FedAvg: an adaptive step has no meaning there and could drive a
running variance below zero. Differs from Flower's FedAdam, which corrects for bias (the algorithm does not) and starts
v at 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.server_optimizer import ServerOptimizer
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common

CITATION = Citation(
    title="Adaptive Federated Optimization",
    authors="Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan",
    year=2021,
    arxiv="2003.00295",
    where="Algorithm 2",
)


class FedAdam(ServerOptimizer):
    """Averages every tensor, and moves the learned ones by Adam's rule.

    Args:
        model: The network.
        server_learning_rate: eta.
        beta_1: Decay of the first moment, in [0, 1).
        beta_2: Decay of the second moment, in [0, 1).
        tau: Degree of adaptivity, positive.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range.
    """

    slots = ("first", "second")

    def __init__(
        self,
        model: nn.Module,
        *,
        server_learning_rate: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **common: Unpack[Common],
    ) -> None:
        if server_learning_rate <= 0 or tau <= 0 or not (0 <= beta_1 < 1 and 0 <= beta_2 < 1):
            raise ConfigError(
                "strategy.server_learning_rate and strategy.tau must be positive, beta_1 and beta_2 in [0, 1); "
                f"got {server_learning_rate}, {tau}, {beta_1}, {beta_2}."
            )
        self.server_learning_rate = server_learning_rate
        self.beta_1, self.beta_2, self.tau = beta_1, beta_2, tau
        super().__init__(model, **common)

    def initial(self, slot: str, like: Tensor) -> Tensor:
        """Return 0 for the first moment, tau^2 for the second."""
        return torch.full_like(like, self.tau**2 if slot == "second" else 0.0)

    def second_moment(self, second: Tensor, delta: Tensor) -> Tensor:
        """Return the next second moment."""
        return self.beta_2 * second + (1 - self.beta_2) * delta**2

    def update(self, old: Tensor, mean: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return the next value of one tensor; its moments are updated in place."""
        delta = mean - old
        first = slots["first"].mul_(self.beta_1).add_(delta, alpha=1 - self.beta_1)
        second = slots["second"].copy_(self.second_moment(slots["second"], delta))
        return old + self.server_learning_rate * first / (second.sqrt() + self.tau)


SPEC = StrategySpec(
    name="fedadam",
    summary="An adaptive (Adam) server optimizer over the learned tensors only.",
    citation=CITATION,
    make=FedAdam,
    verified=(
        "Five rounds against the published formula in float64.",
        "Flower's own FedAdam, once its two differences are undone.",
    ),
)
