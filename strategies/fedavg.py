"""FedAvg: every tensor is averaged, running statistics included.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from Decentralized
Data. AISTATS 2017. https://arxiv.org/abs/1602.05629

    w <- sum_k p_k w_k

In the tables of FedBN and FedWon, "FedAvg" is this over *every* entry of the state dict: a BatchNorm network's running
means and variances are averaged like weights. That is the default here. Averaged variances are too small where means
differ; ``moments="pool"`` combines the moments by the law of total variance instead, and is a repaired baseline, never
the published one.

Batch counters are the first client's, as in FedBN's code, never an average.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.config import choose
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.roles import Kind, Role, RoleRule

POOLED = RoleRule({Kind.MEAN: Role.POOLED, Kind.VAR: Role.POOLED}, why="FedAvg with moments='pool'")


class FedAvg(NormStrategy):
    """Averages every tensor.

    Args:
        model: The network.
        moments: ``average`` running means and variances, as published, or ``pool`` them.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: ``moments`` is neither.
        RoleError: ``moments="pool"`` on a network without running moments.
    """

    def __init__(self, model: nn.Module, *, moments: str = "average", **common: Unpack[Common]) -> None:
        choose("strategy.moments", moments, ("average", "pool"))
        self.moments = moments
        super().__init__(model, **common)

    def role_rule(self) -> RoleRule:
        """Share everything; pool the moments where that was asked for."""
        return POOLED if self.moments == "pool" else self.rule


SPEC = StrategySpec(
    name="fedavg",
    summary="Every tensor is averaged, running statistics included.",
    citation=Citation(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan, Moore, Ramage, Hampson, Agüera y Arcas",
        year=2017,
        arxiv="1602.05629",
    ),
    make=FedAvg,
    verified=(
        "Golden trace fedbn_comm_fedavg: one communication of FedBN's official code.",
        "Flower's own FedAvg, to the last bit of floating-point tensors.",
        "Pooled moments against those of all clients' data together.",
    ),
)
