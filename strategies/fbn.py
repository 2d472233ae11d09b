"""FBN: batch normalization by the statistics of all clients, in training as in evaluation.

Guerraoui, Pinot, Rizk, Stephan, Taiani. Overcoming the Challenges of Batch Normalization in Federated Learning. 2024.
https://arxiv.org/abs/2405.14670. Also a baseline of Hongyao-Chen/HybridBN, as hybrid normalization with a share of 0.

    client k:  y = (x - M) / sqrt(V + eps) * weight + bias        (M, V) as they came, constants for the whole round
               (m_k, v_k) <- (1 - momentum) (m_k, v_k) + momentum (batch mean, unbiased batch variance),  from (M, V)
    server:    M = sum_k p_k m_k;   V = sum_k p_k (v_k + (m_k - M)^2)        ("pool"; else V = sum_k p_k v_k)

Every client normalizes by the same numbers, so that no gradient depends on whose batch it is, and train = eval. Norm
``hybrid_bn`` has the layers; their share of the batch is 0 here, is not trained and travels as it began. (M, V)
begin at 0 and 1: the first round has no normalization.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.config import choose
from fednorm.errors import RoleError
from fednorm.federation.local import Local, Turn
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.norms.hybrid_bn import hybrid_layers
from fednorm.roles import Kind, Role, RoleRule

POOLED = RoleRule({Kind.MEAN: Role.POOLED, Kind.VAR: Role.POOLED}, why="FBN with moments='pool'")


class Global(Local):
    """Normalizes by what came, and lets the running moments follow the client's batches."""

    def begin(self, turn: Turn) -> None:
        """Hold (M, V)."""
        self.layers = hybrid_layers(turn.model).values()
        for layer in self.layers:
            layer.held = layer.running_mean.clone(), layer.running_var.clone()

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Let go of (M, V); the running moments are the client's."""
        del turn
        for layer in self.layers:
            layer.held = None
        return {}


class FBN(NormStrategy):
    """Averages every tensor and pools the moments; clients train by those that came.

    Args:
        model: The network.
        moments: ``pool`` the clients' moments by the law of total variance, or ``average`` them.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: ``moments`` is neither.
        RoleError: The network has no layer of norm ``hybrid_bn``.
    """

    local = Global

    def __init__(self, model: nn.Module, *, moments: str = "pool", **common: Unpack[Common]) -> None:
        choose("strategy.moments", moments, ("average", "pool"))
        self.moments = moments
        super().__init__(model, **common)

    def check(self, model: nn.Module) -> None:
        """Refuse a network without hybrid layers."""
        if not hybrid_layers(model):
            raise RoleError(
                f"Strategy fbn trains layers of norm hybrid_bn by all clients' moments, and this "
                f"{type(model).__name__} has none. Build it with --norm hybrid_bn, or fednorm.convert(model, "
                "'hybrid_bn')."
            )

    def role_rule(self) -> RoleRule:
        """Share everything; pool the moments unless they are to be averaged."""
        return POOLED if self.moments == "pool" else self.rule


SPEC = StrategySpec(
    name="fbn",
    summary="Batch norm by the statistics of all clients, in training as in evaluation.",
    citation=Citation(
        title="Overcoming the Challenges of Batch Normalization in Federated Learning",
        authors="Guerraoui, Pinot, Rizk, Stephan, Taiani",
        year=2024,
        arxiv="2405.14670",
    ),
    make=FBN,
    defaults={"norm": {"name": "hybrid_bn"}},
    deviations=("The paper's robust aggregation of statistics, against clients that lie, is not here.",),
    verified=(
        "Two rounds of a federation of three clients written in plain PyTorch, with the same tensors.",
        "Its training against nn.BatchNorm2d in evaluation mode.",
    ),
    reconstruction="how a client estimates its own moments (a running average over its batches, from those of all "
    "clients) and how the server combines them; the paper's text was not at hand.",
)
