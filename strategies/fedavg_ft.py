"""FedAvg whose model every client fine-tunes before it is evaluated; of that, nothing is kept and nothing is sent.

Jiang, Konečný, Rush, Kannan. Improving Federated Learning Personalization via Model Agnostic Meta Learning. 2019.
https://arxiv.org/abs/1909.12488

    training:    FedAvg
    evaluation:  client k is tested with  SGD(w_t; its training images, tau epochs)

The fine-tuning trains every parameter, with the run's optimizer begun anew and the round's learning rate; running
statistics move with it. A domain that no client has is tested with the server's model as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, Passes, Phase, Turn
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy


class FineTuned(Local):
    """Fine-tunes before an evaluation, ``finetune_epochs`` passes over the client's training images."""

    @classmethod
    def passes(cls, options: Mapping[str, Any]) -> Passes:
        """Add those of the fine-tuning to each evaluation."""
        return Passes(before_evaluation=options["finetune_epochs"])

    def before_evaluation(self, turn: Turn) -> None:
        """Train every parameter."""
        turn.train_aside(self, "finetune", Phase(epochs=self.strategy.finetune_epochs))


class FedAvgFT(NormStrategy):
    """Averages every tensor; clients fine-tune before they are evaluated.

    Args:
        model: The network.
        finetune_epochs: tau, passes over a client's training images before its evaluation, 0 or more; 0 is FedAvg.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: ``finetune_epochs`` is negative.
    """

    local = FineTuned

    def __init__(self, model: nn.Module, *, finetune_epochs: float = 5.0, **common: Unpack[Common]) -> None:
        self.finetune_epochs = require_epochs(finetune_epochs)
        super().__init__(model, **common)


def require_epochs(epochs: float) -> float:
    """Return the epochs of a fine-tuning.

    Raises:
        ConfigError: They are negative.
    """
    if epochs < 0:
        raise ConfigError(f"strategy.finetune_epochs, passes before an evaluation, must be 0 or more; got {epochs}.")
    return epochs


SPEC = StrategySpec(
    name="fedavg_ft",
    summary="FedAvg; every client fine-tunes the model before it is evaluated, and keeps nothing of that.",
    citation=Citation(
        title="Improving Federated Learning Personalization via Model Agnostic Meta Learning",
        authors="Jiang, Konečný, Rush, Kannan",
        year=2019,
        arxiv="1909.12488",
    ),
    make=FedAvgFT,
    personalised=True,
    deviations=(
        "Fine-tuning uses the run's own optimizer and learning rate; the paper tunes those of its second phase.",
    ),
    verified=("Two rounds of a federation of two clients written in plain PyTorch, with the same tensors.",),
)
