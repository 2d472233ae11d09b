"""FedProx: FedAvg whose clients are held near the server's weights.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. MLSys 2020.
https://arxiv.org/abs/1812.06127

    client k minimises  F_k(w) + mu/2 ||w - w_t||^2          (their equation 2)

over the shared, learned tensors; the norm is squared. The server's part is FedAvg.

Differs from FedBN's code, which leaves the term out at the first step of each epoch and in round 0 and, for Office and
DomainNet, takes the root of the sum of squares; and from the code sample in Flower's docstring, which does not square
the norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federated.spec import StrategySpec
from fednorm.federated.strategy import Common, NormStrategy


class FedProx(NormStrategy):
    """Averages every tensor; tells the clients to add the proximal term.

    A client that is not ours reads ``proximal-mu`` from the message's ``ConfigRecord``, as with Flower's FedProx.

    Args:
        model: The network.
        mu: Factor of the proximal term, 0 or more; 0 is FedAvg exactly. FedBN's code uses 0.01 on digits.
        common: See :class:`~fednorm.federated.strategy.NormStrategy`.

    Raises:
        ConfigError: ``mu`` is negative.
    """

    def __init__(self, model: nn.Module, *, mu: float = 0.01, **common: Unpack[Common]) -> None:
        if mu < 0:
            raise ConfigError(f"strategy.mu, the factor of FedProx's term, must be 0 or more; got {mu}.")
        self.mu = float(mu)
        super().__init__(model, **common)

    def client_config(self) -> Mapping[str, float]:
        """Send mu."""
        return {"proximal-mu": self.mu}


SPEC = StrategySpec(
    name="fedprox",
    summary="FedAvg with mu/2 ||w - w_t||^2 added to every client's loss.",
    citation=Citation(
        title="Federated Optimization in Heterogeneous Networks",
        authors="Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith",
        year=2020,
        arxiv="1812.06127",
        where="Equation 2",
    ),
    make=FedProx,
)
