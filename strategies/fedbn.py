"""FedBN: every tensor of a normalization layer stays on its client.

Li, Jiang, Zhang, Kamp, Dou. FedBN: Federated Learning on Non-IID Features via Local Batch Normalization. ICLR 2021.
https://arxiv.org/abs/2102.07623

Scale, shift, running mean, running variance and batch counter of every normalization layer are local; all else is
averaged. Client k is tested on its own domain with its own layers; there is no usable server model for a domain that
no client has, and evaluating one is refused unless a fallback is named (``evaluate.fallback``).

Differs from the official code, which keeps every entry with ``bn`` in its *name*: that misses the normalization of a
ResNet's shortcuts, truncates their counters, and keeps a linear layer whose name happens to contain ``bn``. Here the
layer's type decides. The official code averages with equal weights (``rounds.weighting=equal``); its clients are of
equal size, so that it makes no difference there.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import NormStrategy
from fednorm.roles import NORMALIZATION, Role, RoleRule


class FedBN(NormStrategy):
    """Averages every tensor outside normalization layers.

    Raises:
        RoleError: The network has no normalization layer.
    """

    rule = RoleRule(dict.fromkeys(sorted(NORMALIZATION), Role.LOCAL), why="FedBN keeps normalization layers local: it")


SPEC = StrategySpec(
    name="fedbn",
    summary="Every tensor of a normalization layer stays on its client.",
    citation=Citation(
        title="FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
        authors="Li, Jiang, Zhang, Kamp, Dou",
        year=2021,
        arxiv="2102.07623",
    ),
    make=FedBN,
    personalised=True,
    verified=(
        "Golden trace fedbn_comm_fedbn: one communication of the official code, less the norms it misses by name.",
    ),
)
