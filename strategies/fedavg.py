"""FedAvg: every tensor is averaged, running statistics included.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from Decentralized
Data. AISTATS 2017. https://arxiv.org/abs/1602.05629

    w <- sum_k p_k w_k

In the tables of FedBN and FedWon, "FedAvg" is this over *every* entry of the state dict: a BatchNorm network's running
means and variances are averaged like weights. That is the default here. Averaged variances are too small where means
differ; ``moments="pool"`` combines the moments by the law of total variance instead, and is a repaired baseline, never
the published one.

``moments="pool_tasks"`` is for norms that balance the tasks of a stream (``adab2n``, ``task_balanced_norm``), on
clients that learn on streams: moments and counts are kept by client and task, and merged by the same law
(:mod:`fednorm.federation.task_moments`). With one task it is ``pool``.

Batch counters are the first client's, as in FedBN's code, never an average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.config import choose
from fednorm.federation.replies import Form
from fednorm.federation.spec import StrategySpec
from fednorm.federation.strategy import Common, NormStrategy
from fednorm.federation.task_moments import TaskMoments, TaskPool, require_tasked
from fednorm.roles import Kind, Role, RoleRule

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

POOLED = RoleRule({Kind.MEAN: Role.POOLED, Kind.VAR: Role.POOLED})


class FedAvg(NormStrategy):
    """Averages every tensor.

    Args:
        model: The network.
        moments: ``average`` running means and variances, as published; ``pool`` them; or ``pool_tasks``, those of each
            client and task.
        common: See :class:`~fednorm.federation.strategy.NormStrategy`.

    Raises:
        ConfigError: ``moments`` is none of these.
        RoleError: Pooled moments on a network without running moments; by task on one that does not tell tasks apart.
    """

    def __init__(self, model: nn.Module, *, moments: str = "average", **common: Unpack[Common]) -> None:
        choose("strategy.moments", moments, ("average", "pool", "pool_tasks"))
        self.moments = moments
        super().__init__(model, **common)
        self.pool: TaskPool | None = None
        self.handles: list[RemovableHandle] = []
        if moments == "pool_tasks":
            require_tasked(model, self.plan)
            self.pool = TaskPool(self.plan)
            self.local = TaskMoments  # type: ignore[misc] # its clients do more

    def role_rule(self) -> RoleRule:
        """Share everything; pool the moments where that was asked for."""
        return self.rule if self.moments == "average" else replace(POOLED, why=f"FedAvg with moments={self.moments!r}")

    def let_go(self) -> None:
        """Let no client look at what layers are given any more."""
        while self.handles:
            self.handles.pop().remove()

    def extra_to_send(self) -> Mapping[str, Tensor]:
        """Send the moments of each task."""
        return self.pool.to_send(self.num_experiences) if self.pool else {}

    def extra_expected(self) -> Mapping[str, Form]:
        """Expect those of a client, its counts and shares."""
        return self.pool.expected(self.num_experiences) if self.pool else {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        if self.pool:
            self.pool.begin()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_extra(self, partition_id: int, extra: Mapping[str, Tensor], weight: float) -> None:
        """Take one client's moments of each task."""
        del partition_id
        assert self.pool is not None
        self.pool.add(extra, weight)

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the running moments merged over clients and tasks into the average."""
        del old
        if not self.pool:
            return mean
        merged = self.pool.merged(by_count=self.weighting == "examples")
        return mean | {key: tensor.to(mean[key].dtype) for key, tensor in merged.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments of each task."""
        return self.pool.state_dict() if self.pool else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the moments of each task back."""
        if self.pool:
            self.pool.load_state_dict(state, self.num_experiences)
        else:
            super().load_state_dict(state)


SPEC = StrategySpec(
    name="fedavg",
    summary="Every tensor is averaged, running statistics included.",
    citation=Citation(
        title="Communication-Efficient Learning of Deep Networks from Decentralized Data",
        authors="McMahan, Moore, Ramage, Hampson, Agüera y Arcas",
        year=2017,
        arxiv="1602.05629",
    ),
    make=FedAvg,
    verified=(
        "Golden trace fedbn_comm_fedavg: one communication of FedBN's official code.",
        "Flower's own FedAvg, to the last bit of floating-point tensors.",
        "Pooled moments against those of all clients' data together.",
        "Moments by task: the stream's own with one client, pooled ones with one task, the law written out with two.",
    ),
)
