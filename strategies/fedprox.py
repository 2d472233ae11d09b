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

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, StackedLocal, Turn
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy


class ProximalTerm:
    """Adds the gradient of FedProx's term to the parameters' gradients.

        mu / 2 * sum ||w - w_t||^2,   gradient mu * (w - w_t)

    over the tensors given: the shared, learned ones. Li et al., Federated Optimization in Heterogeneous Networks,
    arXiv 1812.06127. The norm is squared, as in the paper's formula.
    """

    def __init__(self, parameters: Iterable[Tensor], mu: float) -> None:
        """Take the parameters' present values as w_t."""
        self.parameters = list(parameters)
        self.anchors = [parameter.detach().clone() for parameter in self.parameters]
        self.mu = mu

    @torch.no_grad()
    def __call__(self) -> None:
        """Add ``mu * (w - w_t)`` to every gradient."""
        trained = [(p, p.grad, a) for p, a in zip(self.parameters, self.anchors, strict=True) if p.grad is not None]
        if not trained:
            return
        values, grads, anchors = (list(column) for column in zip(*trained, strict=True))
        torch._foreach_add_(grads, torch._foreach_sub(values, anchors), alpha=self.mu)


class StackedProximal(StackedLocal):
    """The proximal terms of several clients at once."""

    def __init__(self, strategy: FedProx, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take the shared, learned tensors as w_t."""
        self.mu = float(config.get("proximal-mu", strategy.mu))
        self.anchors = {key: tensor.clone() for key, tensor in tensors.items()} if self.mu else {}

    @torch.no_grad()
    def adjust(self, tensors: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Add ``mu * (w - w_t)`` to every gradient."""
        for key, anchor in self.anchors.items():
            if key in gradients:
                gradients[key].add_(tensors[key] - anchor, alpha=self.mu)


class Proximal(Local):
    """Holds a client near the server's weights; the factor is the message's ``proximal-mu``, as with Flower's."""

    stacked = StackedProximal

    def begin(self, turn: Turn) -> None:
        """Take the shared, learned tensors as w_t."""
        mu = float(turn.config.get("proximal-mu", self.strategy.mu))
        self.term = ProximalTerm(turn.shared.values(), mu) if mu else None

    def adjust(self, turn: Turn) -> None:
        """Add the term's gradient."""
        del turn
        if self.term:
            self.term()


class FedProx(NormStrategy):
    """Averages every tensor; tells the clients to add the proximal term.

    A client that is not ours reads ``proximal-mu`` from the message's ``ConfigRecord``, as with Flower's FedProx.

    Args:
        model: The network.
        mu: Factor of the proximal term, 0 or more; 0 is FedAvg exactly. FedBN's code uses 0.01 on digits.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: ``mu`` is negative.
    """

    local = Proximal

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
    verified=("The added gradient against autograd's of mu/2 ||w - w_t||^2, in float64.",),
)
