"""FedStein: local scales and shifts, and running statistics shrunk towards all clients' by James and Stein's rule.

Gupta, Jangid, Sethi. FedStein: Enhancing Multi-Domain Federated Learning Through James-Stein Estimator. 2024.
https://arxiv.org/abs/2410.03499

    client k sends its running moments (m_k, v_k), and keeps them;     the server averages them:  (M, V)
    before training and evaluation, in each layer of C channels:
        m <- M + a (m_k - M),    a = max(0, 1 - (C - 2) / sum_c n_k (m_kc - M_c)^2 / V_c)
        v <- V + b (v_k - V),    b = max(0, 1 - (C - 2) / sum_c (n_k - 1) (v_kc - V_c)^2 / (2 V_c^2))

This is the positive-part James-Stein estimator on coordinates of unit variance: a mean of n_k images has the variance
V / n_k, and a variance, of normal values, 2 V^2 / (n_k - 1), n_k the client's training images. It shrinks where a
client's moments are no farther from the others' than chance would put them, and leaves those of another domain alone:
something between averaged (a = 0) and local (a = 1) statistics, for each layer by its own data. With fewer than three
channels nothing is shrunk. A client that has not trained yet takes (M, V).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import RoleError
from fednorm.federation.local import Local, Turn
from fednorm.federation.plan import NormPlan
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.roles import LEARNED, NORMALIZATION, Role, RoleRule

SMALL = 1e-5
"""The least variance that a channel counts with: that of a dead one is 0."""


def shrunk(own: Tensor, towards: Tensor, variance: Tensor) -> Tensor:
    """Return the positive-part James-Stein estimate, towards + max(0, 1 - (C - 2) / ||z||^2) (own - towards).

    Args:
        own: What was measured, shape (C,).
        towards: What it is shrunk towards.
        variance: Of each measurement, greater than 0: z = (own - towards) / sqrt(variance).

    Returns:
        The estimate in float64; ``own`` where C is less than 3.
    """
    own, towards = own.double(), towards.double()
    apart = own - towards
    squares = (apart.square() / variance.double()).sum()
    if len(own) < 3 or not squares:
        return own
    return towards + apart * (1 - (len(own) - 2) / squares).clamp(min=0)


class Shrunk(Local):
    """Keeps the client's moments, and takes the shrunk ones."""

    def state_bytes(self, plan: NormPlan) -> int:
        """Return the bytes of the client's moments."""
        return sum(plan.by_key[key].nbytes for key in self._keys())

    def begin(self, turn: Turn) -> None:
        """Take the shrunk moments."""
        self._take(turn)

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Keep the moments that the training has left."""
        turn.state = {key: turn.tensors[key].clone() for key in self._keys()}
        return {}

    def before_evaluation(self, turn: Turn) -> None:
        """Take the shrunk moments."""
        self._take(turn)

    def _keys(self) -> list[str]:
        return [key for pair in self.strategy.pairs for key in pair]

    @torch.no_grad()
    def _take(self, turn: Turn) -> None:
        count = max(len(turn.client.train), 2)
        for mean_key, var_key in self.strategy.pairs if turn.state else ():
            mean, var = turn.tensors[mean_key], turn.tensors[var_key]
            spread = var.double().clamp(min=SMALL)
            own_mean, own_var = (turn.state[key].to(mean.device) for key in (mean_key, var_key))
            mean.copy_(shrunk(own_mean, mean, spread / count))
            var.copy_(shrunk(own_var, var, 2 * spread.square() / (count - 1)))


class FedStein(NormStrategy):
    """Averages every tensor but normalization layers' learned ones; clients shrink their moments towards the average.

    Attributes:
        pairs: The keys of the running means and variances that are shared, one pair a layer.

    Raises:
        RoleError: The network has no running means and variances.
    """

    local = Shrunk
    rule = RoleRule(
        dict.fromkeys(sorted(NORMALIZATION & LEARNED), Role.LOCAL), why="FedStein keeps scales and shifts local: it"
    )

    def __init__(self, model: nn.Module, **common: Unpack[Common]) -> None:
        super().__init__(model, **common)
        entries = self.plan.by_key
        self.pairs = tuple(
            pair for pair in self.plan.moments() if all(entries[key].role is Role.SHARED for key in pair)
        )
        if not self.pairs:
            raise RoleError(
                f"Strategy fedstein shrinks running means and variances, and this {type(model).__name__} shares none. "
                "Build it with a norm that has them, such as batch_norm, or take strategy fedbn."
            )


SPEC = StrategySpec(
    name="fedstein",
    summary="FedBN's local scales and shifts; running statistics shrunk towards all clients' (James-Stein).",
    citation=Citation(
        title="FedStein: Enhancing Multi-Domain Federated Learning Through James-Stein Estimator",
        authors="Gupta, Jangid, Sethi",
        year=2024,
        arxiv="2410.03499",
    ),
    make=FedStein,
    personalised=True,
    deviations=(
        "A client's variance of estimation is that of independent images; running moments weigh the last batches more.",
    ),
    verified=(
        "The estimate against the formula in plain Python; its risk against the average's and its own on drawn data.",
        "Two rounds of a federation of three clients written in plain PyTorch, with the same tensors.",
    ),
    reconstruction="what is shrunk towards what, by which variances, and where: of the paper only that James-Stein "
    "estimates of the statistics are shared and scales and shifts stay local.",
)
