"""FixBN: batch statistics for the first half of the rounds; then the averaged ones, frozen, in training as well.

Zhong, Chen, Chao. Making Batch Normalization Great in Federated Deep Learning. 2023. https://arxiv.org/abs/2303.06530

    rounds 1 to s T:   batch normalization as ever; its running moments (M, V) are averaged like weights (FedAvg)
    then:              y = (x - M) / sqrt(V + eps) * weight + bias,   (M, V) as they were averaged after round s T

In the second part no gradient sees a batch's statistics, so that those of clients with other labels do not differ for
that reason; scales and shifts are trained on. s = ``share`` is 1/2. A client's optimizer goes on from its own last
round (``train.reset_optimizer`` is false by this strategy's default): with ``train.momentum`` it keeps its momentum, as
published; that is Context.state, in every checkpoint, and never sent.

It holds for every layer with running statistics (``batch_norm``, ``hybrid_bn``, ``batch_renorm``, ...): layers that
rest are in evaluation mode, and their tensors keep their bits, on clients and server. Which round it is and how many
the run has is all that decides, so a run that is resumed needs nothing besides. Made for skewed labels; clients of
different domains have different (M, V).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.local import Local, Turn
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.roles import STATISTICS

if TYPE_CHECKING:
    from fednorm.training.trainee import Trainee


class Fixed(Local):
    """Leaves layers with running statistics in evaluation mode, once these are frozen."""

    def check(self, trainee: Trainee) -> None:
        """Refuse learners on streams, which set the layers' modes themselves."""
        if trainee.config.kind == "federated_continual":
            raise ConfigError(
                "Strategy fixbn freezes statistics half-way through the rounds, and on a stream each experience has "
                "statistics of its own. Take fedavg with grid.norms = 'freeze', which freezes them after the first "
                "experience."
            )

    def begin(self, turn: Turn) -> None:
        """Let the layers rest, or train."""
        fixed = self.strategy.fixed(turn.server_round)
        turn.trainee.trainable.resting = (
            tuple(turn.model.get_submodule(path) for path in self.strategy.layers) if fixed else ()
        )


class FixBN(NormStrategy):
    """Averages every tensor, and leaves running statistics as they are in the later rounds.

    In a federation without fednorm's configuration, set :attr:`num_rounds` to the number of its rounds; while that is
    0, nothing is frozen.

    Args:
        model: The network.
        share: s, the share of the rounds before the statistics are frozen, in [0, 1]; 1 is FedAvg, and 0 trains all
            rounds with the initial statistics.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Attributes:
        layers: The paths of the layers with running statistics.

    Raises:
        ConfigError: ``share`` is out of range.
        RoleError: The network has no running statistics.
    """

    local = Fixed

    def __init__(self, model: nn.Module, *, share: float = 0.5, **common: Unpack[Common]) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(
                f"strategy.share is the share of the rounds with batch statistics, in [0, 1]; got {share}."
            )
        self.share = share
        super().__init__(model, **common)
        self._statistics = tuple(entry.key for entry in self.plan.entries if entry.kind in STATISTICS)
        self.layers = self.plan.estimating
        if not self._statistics:
            raise RoleError(
                f"Strategy fixbn freezes running statistics, and this {type(model).__name__} has none. Build it with "
                "a norm that has them, such as batch_norm, or take strategy fedavg."
            )

    def fixed(self, server_round: int) -> bool:
        """Return whether the statistics are frozen in a round, from 1."""
        return self.num_rounds > 0 and server_round > self.share * self.num_rounds

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep frozen statistics: an average of equal numbers may differ from them in its last bit."""
        if not self.fixed(self.report.server_round):
            return mean
        return mean | {key: old[key] for key in self._statistics if key in mean}


SPEC = StrategySpec(
    name="fixbn",
    summary="Batch statistics for the first half of the rounds, then the averaged ones, frozen, in training as well.",
    citation=Citation(
        title="Making Batch Normalization Great in Federated Deep Learning",
        authors="Zhong, Chen, Chao",
        year=2023,
        arxiv="2303.06530",
    ),
    make=FixBN,
    defaults={"train": {"reset_optimizer": False}},
    deviations=(
        "Layers rest one by one; HybridBN's re-implementation puts the whole network in evaluation mode, its dropout "
        "too.",
        "A last batch of one image is left out in the second part as well, so that both parts see the same batches.",
        "Momentum is what train.momentum says, 0 by default; a client keeps it between its rounds.",
    ),
    verified=(
        "Four rounds of a federation of three clients with momentum, written in plain PyTorch, with the same tensors.",
    ),
)
