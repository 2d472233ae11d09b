"""A federation of a few 4 x 4 images, the real network for digits at a sixteenth of its width, and real clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fednorm.config import resolve
from fednorm.data.domain import Client, Federation, Split
from fednorm.federation.client import make_client_app
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import LOCAL_RECORD, Workbench

SIZES = ((9, 5), (8, 6), (5, 4))
"""Training and test images of each client; the first client's last batch of four has one image."""


def split(count: int, seed: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(20 * seed % 120, 250, (count + 3, 3, 4, 4), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 3, (count + 3,), generator=draw)
    return Split(images, labels, torch.randperm(count + 3, generator=draw)[:count])


def federation(sizes: Sequence[tuple[int, int]], held_out: int) -> Federation:
    clients = tuple(
        Client(
            pid,
            f"domain{pid}",
            split(train, 2 * pid),
            split(0, 1),
            split(test, 2 * pid + 1),
            pid >= len(sizes) - held_out,
        )
        for pid, (train, test) in enumerate(sizes)
    )
    return Federation("synthetic", 3, 4, clients)


class Site:
    """A workbench, its clients, and what they were sent and answered."""

    def __init__(
        self, strategy: str, sizes: Sequence[tuple[int, int]], held_out: int, sections: dict[str, Any]
    ) -> None:
        base: dict[str, Any] = {"model": {"name": "digits_cnn", "width": 4}}
        base["train"] = {"batch_size": 4, "learning_rate": 0.05, **sections.pop("train", {})}
        base["strategy"] = {"name": strategy, **sections.pop("options", {})}
        self.bench = Workbench(resolve(base | dict(sections)), federation(sizes, held_out))
        self.grid = InProcessGrid(make_client_app(lambda _: self.bench), len(sizes), {})
        self.strategy = self.bench.strategy

    def tell(self, pid: int, message_type: str, arrays: Any = None, extra: Any = None, **config: Any) -> RecordDict:
        """Send one client a message; return the content of its reply."""
        initial = self.strategy.initial_arrays(self.bench.model) if arrays is None else arrays
        content = RecordDict({"arrays": initial, "config": ConfigRecord(config)})
        if extra:
            content["extra"] = pack(extra)
        (reply,) = self.grid.send_and_receive([Message(content, dst_node_id=pid + 2, message_type=message_type)])
        assert not reply.has_error(), reply.error.reason
        return reply.content

    def train(self, pid: int, server_round: int, arrays: Any = None, **config: Any) -> dict[str, torch.Tensor]:
        reply = self.tell(pid, "train", arrays, **{"server-round": server_round, **config})
        return unpack(reply.array_records["arrays"])

    def evaluate(self, pid: int, arrays: Any = None, **config: Any) -> dict[str, Any]:
        metrics: MetricRecord = self.tell(pid, "evaluate", arrays, **config).metric_records["metrics"]
        return dict(metrics)

    def kept(self, pid: int) -> dict[str, torch.Tensor]:
        """Return what a client keeps in its context."""
        state = self.grid.contexts[pid + 2].state
        return unpack(state.array_records[LOCAL_RECORD]) if LOCAL_RECORD in state.array_records else {}

    def keep(self, pid: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self.grid.contexts[pid + 2].state[LOCAL_RECORD] = pack(tensors)


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site() -> MakeSite:
    def make(
        strategy: str = "fedavg",
        *,
        sizes: Sequence[tuple[int, int]] = SIZES,
        held_out: int = 0,
        **sections: Any,
    ) -> Site:
        return Site(strategy, sizes, held_out, sections)

    return make
