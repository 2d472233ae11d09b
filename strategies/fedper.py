"""FedPer: the last layers stay on their client, the base is averaged.

Arivazhagan, Aggarwal, Singh, Choudhary. Federated Learning with Personalization Layers. 2019.
https://arxiv.org/abs/1912.00818

    client k:  (B, P_k) <- SGD on its images, both together, E epochs from (B_t, P_k)
    server:    B_{t+1} = sum_k p_k B_k

P_k, the personalization layers, is never sent. Which they are is ``strategy.head``: the last weight layer by default
(the paper's K_P = 1); more of them by patterns over keys, ``strategy.head=fc2.*,fc3.*``.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.recognition.places import patterns_of
from fednorm.roles import RoleRule


class FedPer(NormStrategy):
    """Averages every tensor but the head's.

    Args:
        model: The network.
        head: The layers that stay: patterns (:mod:`fednorm.recognition.places`), separated by commas; ``head`` is the
            last weight layer.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: There is no pattern, or one matches nothing.
        RoleError: Nothing would be left to average.
    """

    def __init__(self, model: nn.Module, *, head: str = "head", **common: Unpack[Common]) -> None:
        self.head = require_head(head)
        super().__init__(model, **common)

    def role_rule(self) -> RoleRule:
        """Keep the head."""
        return RoleRule(local_modules=self.head, why="FedPer keeps the last layers local: it")


def require_head(head: str) -> tuple[str, ...]:
    """Return the patterns of an option that names a head.

    Raises:
        ConfigError: There is none.
    """
    patterns = patterns_of(head)
    if not patterns:
        raise ConfigError(
            "strategy.head names the layers that are treated apart: 'head', the last weight layer, or patterns over "
            "keys such as 'fc3.*'; got none. Without any, the strategy is fedavg."
        )
    return patterns


SPEC = StrategySpec(
    name="fedper",
    summary="The last layers stay on their client; all others are averaged.",
    citation=Citation(
        title="Federated Learning with Personalization Layers",
        authors="Arivazhagan, Aggarwal, Singh, Choudhary",
        year=2019,
        arxiv="1912.00818",
    ),
    make=FedPer,
    personalised=True,
    deviations=(
        "Running statistics outside the personalization layers are averaged with the base; the paper does not say.",
    ),
    verified=("Two rounds of a federation of two clients written in plain PyTorch, with the same tensors.",),
)
