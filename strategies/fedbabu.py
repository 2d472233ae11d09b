"""FedBABU: the head stays at its random initial values in training; clients fine-tune before they are evaluated.

Oh, Kim, Yun. FedBABU: Toward Enhanced Representation for Federated Image Classification. ICLR 2022.
https://arxiv.org/abs/2106.06042

    client k:    phi_k <- SGD over the body phi alone, E epochs, from phi_t, with the head h_0 fixed
    server:      phi_{t+1} = sum_k p_k phi_k
    evaluation:  client k is tested with  SGD(phi_t, h_0; its training images, tau_f epochs), body and head

h_0, the head's initial values, is the same on every client: all draw it from the run's seed. So it need not travel, and
its role is ``reset``. Of the fine-tuning, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.federation.local import Phase, Turn, learned_keys
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.recognition.places import keys_at
from fednorm.roles import RoleRule
from strategies.fedavg_ft import FineTuned, require_epochs
from strategies.fedper import require_head


class BodyOnly(FineTuned):
    """Trains the body, and before an evaluation everything."""

    def phases(self, turn: Turn) -> Sequence[Phase]:
        """Return the run's epochs, for the body alone."""
        return (Phase(learned_keys(turn) - self.strategy.head_keys),)


class FedBABU(NormStrategy):
    """Averages every tensor but the head's, which keeps its initial values.

    Args:
        model: The network.
        head: The head: patterns (:mod:`fednorm.recognition.places`), separated by commas; ``head`` is the last weight
        layer.
        finetune_epochs: tau_f, passes over a client's training images before its evaluation, 0 or more.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range, or a pattern matches nothing.
        RoleError: Nothing would be left to average.
    """

    local = BodyOnly

    def __init__(
        self, model: nn.Module, *, head: str = "head", finetune_epochs: float = 5.0, **common: Unpack[Common]
    ) -> None:
        self.head = require_head(head)
        self.finetune_epochs = require_epochs(finetune_epochs)
        self.head_keys = keys_at(model, self.head)
        super().__init__(model, **common)

    def role_rule(self) -> RoleRule:
        """Begin every round with the head's initial values."""
        return RoleRule(reset_modules=self.head, why="FedBABU freezes the head: it")


SPEC = StrategySpec(
    name="fedbabu",
    summary="The head keeps its initial values in training; every client fine-tunes before it is evaluated.",
    citation=Citation(
        title="FedBABU: Toward Enhanced Representation for Federated Image Classification",
        authors="Oh, Kim, Yun",
        year=2022,
        arxiv="2106.06042",
    ),
    make=FedBABU,
    personalised=True,
    deviations=("The head is drawn from the run's seed on every client, and not sent.",),
    verified=("Two rounds of a federation of two clients written in plain PyTorch, with the same tensors.",),
)
