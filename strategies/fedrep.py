"""FedRep: a client first fits its own head to the shared representation, then the representation to its head.

Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021. https://arxiv.org/abs/2102.07078, Algorithm 1

    client k:  h_k <- SGD over h alone, tau_h epochs, from h_k, with the representation phi_t fixed
               phi_k <- SGD over phi alone, E epochs, from phi_t, with h_k fixed
    server:    phi_{t+1} = sum_k p_k phi_k

The head h_k is never sent. The layers are in training mode in both phases, so running statistics, which belong to the
representation, follow both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.local import Local, Passes, Phase, Turn, learned_keys
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common
from fednorm.recognition.places import keys_at
from strategies.fedper import FedPer


class HeadThenBody(Local):
    """Trains the head, then all else."""

    @classmethod
    def passes(cls, options: Mapping[str, Any]) -> Passes:
        """Add the head's, of which each is little more than a forward pass: a third of one that trains everything."""
        return Passes(in_round=options["head_epochs"] / 3)

    def phases(self, turn: Turn) -> Sequence[Phase]:
        """Return the head's epochs, then the run's for the representation."""
        learned, head = learned_keys(turn), self.strategy.head_keys
        return (Phase(learned & head, epochs=self.strategy.head_epochs), Phase(learned - head))


class FedRep(FedPer):
    """Averages every tensor but the head's, which is trained first.

    Args:
        model: The network.
        head: As for :class:`~strategies.fedper.FedPer`.
        head_epochs: tau_h, passes over a client's images for the head, greater than 0; the representation has the
            run's ``train.local_epochs`` or ``local_steps``. The paper's experiments have 10.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range, or a pattern matches nothing.
        RoleError: Nothing would be left to average.
    """

    local = HeadThenBody

    def __init__(
        self, model: nn.Module, *, head: str = "head", head_epochs: float = 10.0, **common: Unpack[Common]
    ) -> None:
        if head_epochs <= 0:
            raise ConfigError(
                f"strategy.head_epochs, passes for the head alone, must be greater than 0; got {head_epochs}. A head "
                "that is trained together with the rest is strategy 'fedper'."
            )
        self.head_epochs = head_epochs
        super().__init__(model, head=head, **common)
        self.head_keys = keys_at(model, self.head)


SPEC = StrategySpec(
    name="fedrep",
    summary="The head stays on its client and is trained first, then the shared representation.",
    citation=Citation(
        title="Exploiting Shared Representations for Personalized Federated Learning",
        authors="Collins, Hassani, Mokhtari, Shakkottai",
        year=2021,
        arxiv="2102.07078",
        where="Algorithm 1",
    ),
    make=FedRep,
    personalised=True,
    deviations=("The representation has as many epochs as the run says; the paper's theory takes one step.",),
    verified=("Two rounds of a federation of two clients written in plain PyTorch, with the same tensors.",),
)
