"""What a strategy may do on the server between two experiences.

A strategy that works there descends from :class:`BetweenExperiences`; after every experience but the last the workbench
of the grid gives it a :class:`Boundary`, when all clients have ended the experience and were scored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fednorm.data.scaling import Scaling
from fednorm.errors import IncompleteError
from fednorm.federation.nodes import asked
from fednorm.federation.replies import UnfitReply, read_local
from fednorm.federation.strategy import NormStrategy


@dataclass(frozen=True)
class Images:
    """What a run's images are like.

    Attributes:
        shape: Channels, height, width.
        num_classes: K, the outputs of the network.
        scaling: From pixels to what the network is given; of several groups, each experience has its own.
    """

    shape: tuple[int, int, int]
    num_classes: int
    scaling: Scaling


@dataclass(frozen=True)
class Boundary:
    """Where the server stands between two experiences.

    Attributes:
        time: How many experiences have ended before the one that has ended now.
        tensors: The server's, not to be written to.
        classes: Those that any client has met so far, ascending.
        device: Where to compute.
        ask: Returns the local tensors of the client with a partition id, asked from it alone; None where it has none,
            as it never trained. Raises an IncompleteError where it does not answer.
        score: Returns the accuracy of a network, in evaluation mode, on the test images of all experiences met so far,
            in [0, 1]. A measure for the record: a server has no such images.
    """

    time: int
    tensors: Mapping[str, Tensor]
    classes: tuple[int, ...]
    device: torch.device
    ask: Callable[[int], Mapping[str, Tensor] | None]
    score: Callable[[nn.Module], float]


class BetweenExperiences(NormStrategy):
    """A strategy whose server works between experiences."""

    def meet(self, images: Images) -> None:
        """Be told, before a run, what its images are like; refuse here what could only fail between experiences."""

    @abstractmethod
    def between(self, boundary: Boundary) -> dict[str, Any]:
        """Work between two experiences, and return what the record's line says of it; may be empty."""

    @abstractmethod
    def about_between(self) -> dict[str, Any]:
        """Return what the plan and the record say of that work before a run; ``text`` is one line to be read."""


def local_of(strategy: NormStrategy, grid: Grid, client: int) -> dict[str, Tensor] | None:
    """Ask one client, and no other, for its local tensors (``query.local``); what it sends counts as sent.

    Args:
        strategy: The run's, which knows its nodes.
        grid: The way to them.
        client: Its partition id.

    Returns:
        Its local tensors; None where it has none, as it never trained.

    Raises:
        IncompleteError: It does not answer, or not with what the plan says.
    """
    nodes = [node for node in strategy.nodes if node.partition_id == client]
    reasons: list[str] = []

    def reject(partition_id: int | None, unfit: UnfitReply) -> None:
        reasons.append(unfit.reason)
        strategy.report.reject(partition_id, unfit, during="query.local")

    replies = asked(grid, RecordDict(), "query.local", nodes, lambda _, reply: read_local(reply, strategy.plan), reject)
    for _, local in replies:
        if local is None:
            return None
        strategy.report.bytes_up += sum(tensor.nbytes for tensor in local[1].values())
        return local[1]
    raise IncompleteError(
        f"Client {client} was asked for its local tensors (query.local), which the strategy needs between two "
        f"experiences, and sent none: {'; '.join(reasons) or 'no such client is there'}. A site answers where its node "
        "allows it (allow-statistics=true)."
    )
