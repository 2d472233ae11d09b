"""SiloBN: running statistics stay on their client, learned scales and shifts are shared.

Andreux, du Terrail, Beguier, Tramel. Siloed Federated Learning for Multi-Centric Histopathology Datasets. DCL 2020.
https://arxiv.org/abs/2008.07424

Running means, variances and batch counters are local; weights, scales and shifts are averaged. On a domain that no
client has, the paper recomputes the statistics on that domain's own images (AdaBN): ``evaluate.fallback=reestimated``.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import NormStrategy
from fednorm.roles import STATISTICS, Role, RoleRule


class SiloBN(NormStrategy):
    """Averages every tensor but the running statistics.

    Raises:
        RoleError: The network has no running statistics.
    """

    rule = RoleRule(dict.fromkeys(sorted(STATISTICS), Role.LOCAL), why="SiloBN keeps running statistics local: it")


SPEC = StrategySpec(
    name="silobn",
    summary="Running statistics stay on their client; learned scales and shifts are shared.",
    citation=Citation(
        title="Siloed Federated Learning for Multi-Centric Histopathology Datasets",
        authors="Andreux, du Terrail, Beguier, Tramel",
        year=2020,
        arxiv="2008.07424",
    ),
    make=SiloBN,
    personalised=True,
    verified=("Its roles, tensor by tensor, and the contract of all strategies; no official code was at hand.",),
)
