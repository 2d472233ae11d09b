"""SPECIAL: FedAvg whose server blends the average with an earlier model of its own, the anchor.

Xu, Li. Server-Proximal Aggregation for Federated Domain-Incremental Learning under Partial Participation: Task-Uniform
Convergence and Backward Transfer. ICML 2026. https://arxiv.org/abs/2601.22274 (SPECIAL: Server-Proximal Efficient
Continual Aggregation for Learning)

    w <- argmin_w  1/2 ||w - mean_k w_k||^2 + mu/2 ||w - a||^2  =  (mean_k w_k + mu a) / (1 + mu)

over the shared, learned tensors. ``anchor="round"``: a is the server's model before the round, "the previous global
model". ``anchor="experience"``: a is the server's model at the end of the experience before, so that what holds the
network back is the previous task and not the present round; in the first experience there is none, and the average
stays. Running statistics and counters are averaged as in FedAvg: they are of the present experience's images.

Nothing is sent or kept on a client besides. The paper's text was not at hand: see what is reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.config import choose
from fednorm.errors import ConfigError
from fednorm.federation.local import Local
from fednorm.federation.server_optimizer import ServerOptimizer
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common

if TYPE_CHECKING:
    from fednorm.training.trainee import Trainee


class Anchored(Local):
    """Trains as FedAvg's clients do."""

    def check(self, trainee: Trainee) -> None:
        """Refuse the model of the experience before where there are no experiences."""
        if self.strategy.anchor == "experience" and trainee.config.kind == "federated":
            raise ConfigError(
                "strategy.anchor = 'experience' holds the server's model near that of the experience before, and a "
                "plain federation has one experience: it would silently be FedAvg. Name a --scenario, or take anchor = "
                "'round'."
            )


class Special(ServerOptimizer):
    """Averages every tensor, and blends the learned ones with an earlier model of the server.

    Args:
        model: The network.
        mu: Factor of the anchor's term, 0 or more; 0 is FedAvg.
        anchor: ``round``, the server's model before the round; ``experience``, that at the end of the last experience.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: An argument is out of range.
    """

    local = Anchored
    slots = ("anchor",)

    def __init__(self, model: nn.Module, *, mu: float = 0.1, anchor: str = "round", **common: Unpack[Common]) -> None:
        if not 0 <= mu < float("inf"):
            raise ConfigError(f"strategy.mu is the factor of the anchor's term, 0 or more; got {mu}.")
        choose("strategy.anchor", anchor, ("round", "experience"))
        self.mu, self.anchor = mu, anchor
        super().__init__(model, **common)

    def update(self, old: Tensor, mean: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """Return the blend for one tensor; the anchor is taken in the first round of an experience."""
        held, done = slots["anchor"], self.report.server_round - 1
        if self.anchor == "round" or (done and self.ends_experience(done)):
            held.copy_(old)
        elif done < self.num_rounds // self.num_experiences:  # nothing comes before the first experience
            return mean
        return mean.lerp(held, self.mu / (1 + self.mu))


SPEC = StrategySpec(
    name="special",
    summary="FedAvg whose server blends the average with its model of the round, or of the experience, before.",
    citation=Citation(
        title="Server-Proximal Aggregation for Federated Domain-Incremental Learning under Partial Participation",
        authors="Xu, Li",
        year=2026,
        arxiv="2601.22274",
    ),
    make=Special,
    reconstruction="the proximal step's closed form, mu, and which tensors it is of: of the paper only that the server "
    "blends each round's aggregate with the previous global model by a proximal step.",
    deviations=("anchor = 'experience', the model of the previous task, is an option of ours.",),
    verified=("The minimum of its objective by autograd; rounds over two experiences with the anchors written out.",),
)
