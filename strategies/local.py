"""Local training: no communication at all, every client by itself; what a federation must beat.

Kairouz, McMahan, et al. Advances and Open Problems in Federated Learning. 2021. https://arxiv.org/abs/1912.04977

    client k:  w_k <- SGD on its images, E epochs a round, from w_k;  all begin at the same initial weights

Nothing is sent. With ``rounds.fraction`` 1, R rounds are R times ``train.local_epochs`` epochs of training.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import NormStrategy
from fednorm.roles import Kind, Role, RoleRule


class LocalTraining(NormStrategy):
    """Averages nothing."""

    rule = RoleRule(dict.fromkeys(Kind, Role.LOCAL), why="Training alone")
    silent = True


SPEC = StrategySpec(
    name="local",
    summary="No communication: every client trains by itself.",
    citation=Citation(
        title="Advances and Open Problems in Federated Learning",
        authors="Kairouz, McMahan, et al.",
        year=2021,
        arxiv="1912.04977",
    ),
    make=LocalTraining,
    personalised=True,
    verified=("Each client against training alone, written in plain PyTorch.",),
)
