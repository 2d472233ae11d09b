"""A laboratory for strategies: a network of a few hundred parameters, and clients that answer what they are told to."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fednorm.cards import STRATEGIES
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.replies import EXTRA
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import pack, unpack
from fednorm.norms import make_norm
from fednorm.rng import torch_seeded
from fednorm.roles import Kind

State = dict[str, Tensor]
Answer = tuple[Mapping[str, Tensor], float]


class ShuffledGrid(InProcessGrid):
    """A grid with random node ids, as Flower's, whose replies come in an order of their own."""

    def __init__(self, app: ClientApp, num_nodes: int, *, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__(app, num_nodes, {})
        self.order, self.shuffle = random.Random(seed), shuffle
        ids = self.order.sample(range(2**40), num_nodes)
        self.contexts = {
            node_id: Context(1, node_id, dict(context.node_config), RecordDict(), {})
            for node_id, context in zip(ids, self.contexts.values(), strict=True)
        }

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if self.shuffle:
            self.order.shuffle(replies)
        return iter(replies)


def answering(answer: Callable[[int, Message], RecordDict], held_out: Iterable[int] = ()) -> ClientApp:
    """Return an app whose clients describe themselves and train by ``answer(partition id, message)``."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        pid = int(context.node_config["partition-id"])
        about = ConfigRecord({"partition-id": pid, "domain": f"domain{pid}", "held-out": pid in set(held_out)})
        return Message(RecordDict({"client": about}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        pid = int(context.node_config["partition-id"])
        reply = answer(pid, message)
        if EXTRA in message.content:  # as SCAFFOLD's: what goes back has the form of what came
            came = unpack(message.content.array_records[EXTRA])
            reply = RecordDict({**reply, EXTRA: pack({key: t + 0.25 * (pid + 1) for key, t in came.items()})})
        return Message(reply, reply_to=message)

    @app.query("measure")
    def measure(message: Message, _: Context) -> Message:
        came = unpack(message.content.array_records[EXTRA])  # as HBN's second pass, of the form of what came
        reply = {EXTRA: pack({key: torch.full_like(t, 2.5) for key, t in came.items()})}
        return Message(RecordDict(reply), reply_to=message)

    return app


def content(tensors: Mapping[str, Tensor], examples: float, **more: float) -> RecordDict:
    metrics = MetricRecord({"num-examples": examples, "loss": 1.0, **more})
    return RecordDict({"arrays": pack(tensors), "metrics": metrics})


class Lab:
    """What the tests of strategies do again and again."""

    ShuffledGrid = ShuffledGrid
    answering = staticmethod(answering)
    content = staticmethod(content)

    @staticmethod
    def network(name: str = "fedavg") -> nn.Module:
        """Return a small network that a strategy accepts, normalization layers in it wherever it can have them."""
        norm = make_norm(STRATEGIES[name].defaults.get("norm", {}).get("name", "batch_norm"))
        with torch_seeded(3, "network"):
            return nn.Sequential(
                norm.conv(3, 4, 3), norm.layer(4, 2), norm.activation("relu"), nn.Flatten(), nn.Linear(16, 3)
            )

    @classmethod
    def make(cls, name: str, **options: Any) -> NormStrategy:
        return STRATEGIES[name].make(cls.network(name), **options)

    @staticmethod
    def update(strategy: NormStrategy, seed: int) -> State:
        """Return one client's tensors: any numbers, variances of 0 or more, counters of their type."""
        draw = torch.Generator().manual_seed(seed)
        state = {}
        for key in strategy.plan.sent:
            entry = strategy.plan.by_key[key]
            if entry.kind is Kind.COUNT:
                state[key] = torch.randint(0, 2**40, entry.shape, generator=draw)
            else:
                state[key] = torch.randn(entry.shape, generator=draw) * 10.0 ** torch.randint(-3, 4, (), generator=draw)
            if entry.kind is Kind.VAR:
                state[key] = state[key].abs().sub(0.1).clamp(min=0)
        return state

    @staticmethod
    def answers(answers: Mapping[int, Answer], **grid: Any) -> ShuffledGrid:
        """Return a grid whose clients answer with fixed tensors and numbers of examples."""
        app = answering(lambda pid, _: content(answers[pid][0], answers[pid][1]))
        return ShuffledGrid(app, len(answers), **grid)

    @classmethod
    def round(
        cls, strategy: NormStrategy, old: Mapping[str, Tensor], grid: InProcessGrid, server_round: int = 1
    ) -> State:
        """Return the server's tensors after one round."""
        messages = strategy.configure_train(server_round, pack(old), ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        assert arrays is not None
        return unpack(arrays)

    @classmethod
    def rounds(
        cls,
        strategy: NormStrategy,
        updates: Iterable[Mapping[int, Answer]],
        old: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Return the server's tensors after one round for each set of answers, from its initial ones."""
        tensors = dict(old if old is not None else unpack(strategy.initial_arrays(cls.network(cls.name_of(strategy)))))
        for answers in updates:
            strategy.nodes = ()  # every round has a grid of its own, with other node ids
            tensors = cls.round(strategy, tensors, cls.answers(answers))
        return tensors

    @staticmethod
    def name_of(strategy: NormStrategy) -> str:
        return type(strategy).__module__.rpartition(".")[2]


@pytest.fixture
def lab() -> type[Lab]:
    return Lab
