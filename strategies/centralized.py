"""Centralized training: one trainer on the training images of all clients; the upper bound of a federation.

Kairouz, McMahan, et al. Advances and Open Problems in Federated Learning. 2021. https://arxiv.org/abs/1912.04977

    w <- SGD on the union of all clients' training images, E epochs a round

The first client is given every client's training images, and the others none (``pooled`` on the card). It alone trains;
``rounds.fraction`` and ``rounds.weighting`` make no difference. Every client evaluates the one model on its own images.
One batch is drawn from all domains together, and an epoch is as many steps as all clients' together, one after the
other: set ``train.local_steps`` to compare at equal numbers of steps.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy


class Centralized(NormStrategy):
    """Takes the one trainer's tensors.

    Args:
        model: The network.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: Something is to stay on the clients, of which only one trains.
    """

    def __init__(self, model: nn.Module, **common: Unpack[Common]) -> None:
        if common.get("local"):
            raise ConfigError(
                f"strategy.local is {common['local']!r}, and strategy 'centralized' has one trainer: what stayed "
                "with it would be random on all other clients. Leave strategy.local out."
            )
        super().__init__(model, **common)


SPEC = StrategySpec(
    name="centralized",
    summary="One trainer on the training images of all clients; every client evaluates its model.",
    citation=Citation(
        title="Advances and Open Problems in Federated Learning",
        authors="Kairouz, McMahan, et al.",
        year=2021,
        arxiv="1912.04977",
    ),
    make=Centralized,
    pooled=True,
    verified=("One training on the union of the images, written in plain PyTorch.",),
)
