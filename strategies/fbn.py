"""FBN: batch normalization by the statistics of all clients, in training as in evaluation.

Guerraoui, Pinot, Rizk, Stephan, Taiani. Overcoming the Challenges of Batch Normalization in Federated Learning. 2024.
https://arxiv.org/abs/2405.14670. As the baseline of Hongyao-Chen/HybridBN (FedBaseline/models/FBN) has it.

    client k:  y = (x - M) / sqrt(V + eps) * weight + bias        (M, V) as they came, constants for the whole round
               m_k, v_k = means over the round's batches of their means and of their biased variances
    server:    M <- (1 - beta) M + beta sum_k p_k m_k,                        beta = ``global_momentum``
               V <- (1 - beta) V + beta sum_k p_k (v_k + (m_k - M)^2),        M the new one

Every client normalizes by the same numbers, so that no gradient depends on whose batch it is, and train = eval. It is
hybrid normalization with a share of 0: norm ``hybrid_bn`` has the layers, whose share is not trained here and travels
as it began. (M, V) begin at 0 and 1 and move slowly: the first round has no normalization.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.local import Local, Turn
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.norms.hybrid_bn import Held, hybrid_layers
from fednorm.roles import Kind, Role, RoleRule


class Global(Local):
    """Normalizes by what came, and lets the running moments become those of the client's batches."""

    def begin(self, turn: Turn) -> None:
        """Hold (M, V)."""
        self.layers = hybrid_layers(turn.model).values()
        for layer in self.layers:
            layer.held = Held(layer.running_mean.clone(), layer.running_var.clone())

    def end(self, turn: Turn) -> Mapping[str, Tensor]:
        """Let go of (M, V); the running moments are the client's."""
        del turn
        for layer in self.layers:
            layer.held = None
        return {}


class FBN(NormStrategy):
    """Averages every tensor, and moves (M, V) towards the pooled moments of the clients, who train by (M, V).

    Args:
        model: The network.
        global_momentum: beta, the weight of a round in (M, V), in (0, 1].
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: ``global_momentum`` is out of range.
        RoleError: The network has no layer of norm ``hybrid_bn``.
    """

    local = Global
    rule = RoleRule({Kind.MEAN: Role.POOLED, Kind.VAR: Role.POOLED}, why="FBN pools moments: it")

    def __init__(self, model: nn.Module, *, global_momentum: float = 0.1, **common: Unpack[Common]) -> None:
        if not 0 < global_momentum <= 1:
            raise ConfigError(f"strategy.global_momentum, beta, is in (0, 1]; got {global_momentum}.")
        self.global_momentum = global_momentum
        super().__init__(model, **common)

    def check(self, model: nn.Module) -> None:
        """Refuse a network without hybrid layers."""
        if not hybrid_layers(model):
            raise RoleError(
                f"Strategy fbn trains layers of norm hybrid_bn by all clients' moments, and this "
                f"{type(model).__name__} has none. Build it with --norm hybrid_bn, or fednorm.convert(model, "
                "'hybrid_bn')."
            )

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move (M, V), from the pooled moments (m, v): sum_k p_k (v_k + (m_k - M)^2) = v + (m - M)^2."""
        moved: dict[str, Tensor] = {}
        for mean_key, var_key in self.plan.moments():
            if self.plan.by_key[var_key].role is not Role.POOLED:  # strategy.local keeps it
                continue
            pooled_mean, pooled_var = (mean[key].double() for key in (mean_key, var_key))
            centre = old[mean_key].double().lerp(pooled_mean, self.global_momentum)
            spread = pooled_var + (pooled_mean - centre).square()
            for key, new in (
                (mean_key, centre),
                (var_key, old[var_key].double().lerp(spread, self.global_momentum)),
            ):
                moved[key] = new.to(mean[key].dtype)
        return mean | moved


SPEC = StrategySpec(
    name="fbn",
    summary="Batch norm by the statistics of all clients, in training as in evaluation.",
    citation=Citation(
        title="Overcoming the Challenges of Batch Normalization in Federated Learning",
        authors="Guerraoui, Pinot, Rizk, Stephan, Taiani",
        year=2024,
        arxiv="2405.14670",
        where="as re-implemented in Hongyao-Chen/HybridBN, FedBaseline/models/FBN",
    ),
    make=FBN,
    defaults={"norm": {"name": "hybrid_bn"}},
    deviations=(
        "V is divided by the clients' images n; HybridBN's by n - 1. Weights are those of rounds.weighting.",
        "The paper's robust aggregation of statistics, against clients that lie, is not here.",
    ),
    verified=(
        "Two rounds of a federation of three clients written in plain PyTorch, with the same tensors.",
        "Its training against nn.BatchNorm2d in evaluation mode.",
    ),
    reconstruction="that the paper estimates and merges moments as HybridBN's re-implementation does; its own text and "
    "code were not at hand.",
)
