"""Ditto: beside FedAvg's model, every client trains one of its own that is held near the server's.

Li, Hu, Beirami, Smith. Ditto: Fair and Robust Federated Learning Through Personalization. ICML 2021.
https://arxiv.org/abs/2012.04221, Algorithm 1

    w_k <- SGD on F_k, E epochs, from w_t                                          (sent, averaged: FedAvg)
    v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w_t)),  s epochs, from v_k     (never sent)

Client k is evaluated with v_k. v_k has every tensor of the model, its own running statistics among them; the pull is
on learned parameters. It is ``Turn.state``: one model's size for each client that has trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, Passes, Phase, Turn
from fednorm.federation.plan import NormPlan
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy


class Personal(Local):
    """Trains v_k after w_k, and is evaluated with it."""

    @classmethod
    def passes(cls, options: Mapping[str, Any]) -> Passes:
        """Add those for v_k to each round."""
        return Passes(in_round=options["personal_epochs"])

    def state_bytes(self, plan: NormPlan) -> int:
        """Return the bytes of a whole model."""
        return sum(entry.nbytes for entry in plan.entries)

    def begin(self, turn: Turn) -> None:
        """Take the server's tensors as w_t; a client's first v_k is w_t."""
        self.server = turn.read()

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Train v_k and put w_k back."""
        trained = turn.read()
        turn.write(turn.state or self.server)
        phase = Phase(epochs=self.strategy.personal_epochs)
        turn.train_aside(self, "personal", phase, lambda: self._pull(turn))
        turn.state = turn.read()
        turn.write(trained)
        return {}

    @torch.no_grad()
    def _pull(self, turn: Turn) -> None:
        """Add ``lambda * (v_k - w_t)`` to every gradient."""
        for key, parameter in turn.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self.server[key], alpha=self.strategy.lambd)

    def before_evaluation(self, turn: Turn) -> None:
        """Take v_k; a client that has never trained has the server's model."""
        turn.write(turn.state)


class Ditto(NormStrategy):
    """Averages every tensor; clients keep a model of their own besides.

    Args:
        model: The network.
        lambd: lambda, how strongly v_k is held near w_t, 0 or more; 0 is training alone.
        personal_epochs: Passes over a client's images for v_k a round, greater than 0.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range.
    """

    local = Personal

    def __init__(
        self, model: nn.Module, *, lambd: float = 0.1, personal_epochs: float = 1.0, **common: Unpack[Common]
    ) -> None:
        if lambd < 0 or personal_epochs <= 0:
            raise ConfigError(
                "strategy.lambd, Ditto's lambda, must be 0 or more and strategy.personal_epochs greater than 0; got "
                f"{lambd} and {personal_epochs}."
            )
        self.lambd, self.personal_epochs = lambd, personal_epochs
        super().__init__(model, **common)


SPEC = StrategySpec(
    name="ditto",
    summary="FedAvg, and on every client a model of its own that is held near the server's.",
    citation=Citation(
        title="Ditto: Fair and Robust Federated Learning Through Personalization",
        authors="Li, Hu, Beirami, Smith",
        year=2021,
        arxiv="2012.04221",
        where="Algorithm 1",
    ),
    make=Ditto,
    personalised=True,
    deviations=(
        "v_k begins as the server's model of the client's first round, not of the first round of all.",
        "The local solver of v_k is the run's optimizer, begun anew every round, with the round's learning rate.",
    ),
    verified=(
        "Two rounds of a federation of two clients written in plain PyTorch, with the same tensors.",
        "On quadratic losses it ends at the minimum of the personal objective.",
    ),
)
