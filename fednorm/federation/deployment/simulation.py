"""Clients of Flower's own simulation whose state outlives its processes: a run that was cut short there goes on.

Each client keeps its state in the run's record, as a site keeps its own on its disk (:mod:`.kept`), and the server says
with every message of which round it has used the client's training last, and how many rounds have ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from flwr.serverapp import Grid

from fednorm.federation.deployment.grid import AddressedGrid
from fednorm.federation.deployment.kept import Keeping, KeptOnDisk
from fednorm.federation.nodes import Node
from fednorm.federation.round_report import RoundReport
from fednorm.federation.workbench import Workbench
from fednorm.records.record import RunRecord


def keeping_in(folder: str) -> Keeping:
    """Return what lets a process's clients keep their state in a folder."""

    @cache
    def disk(number: int) -> KeptOnDisk:
        return KeptOnDisk(Path(folder), str(number))

    return Keeping(disk)


class SimulatedGrid(AddressedGrid):
    """A grid that says to each client which round of it was used last.

    Args:
        grid: Flower's own.
        bench: The run's workbench, whose strategy knows the nodes.
        record: The run's record, whose lines say who was trained before.

    Attributes:
        ended: How many rounds have ended: what the record has of them is not undone any more.
    """

    def __init__(self, grid: Grid, bench: Workbench, record: RunRecord | None) -> None:
        super().__init__(grid)
        self._bench, self._record = bench, record
        self.ended = 0
        self._last: dict[int, int] = {}
        self._known: tuple[tuple[Node, ...], dict[int, int]] = ((), {})
        self.addressed = self._said

    def begin(self, ended: int) -> None:
        """Learn, before the first round, whose training the rounds so far have used.

        Args:
            ended: How many rounds there are.
        """
        self.ended = ended
        for line in self._record.lines()[:ended] if self._record else ():
            self._last |= {client["client"]: line["round"] for client in line["clients"]["train"]}

    def note(self, report: RoundReport) -> None:
        """Learn whose training a round has used."""
        self._last |= {client.partition_id: report.server_round for client in report.train}

    def _said(self, node_id: int) -> Mapping[str, str | int] | None:
        nodes = self._bench.strategy.nodes
        if self._known[0] is not nodes:
            self._known = nodes, {node.node_id: node.partition_id for node in nodes}
        number = self._known[1].get(node_id)
        if number is None:
            return None
        return {
            "run": self._bench.config.hash,
            "partition-id": number,
            "last-round": self._last.get(number, 0),
            "ended": self.ended,
        }
