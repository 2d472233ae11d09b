"""What every strategy of fednorm shares: a Flower ``Strategy`` that knows what its tensors are.

Differences from ``flwr.serverapp.strategy.FedAvg``, each the closing of a trap:

* clients are sampled by *partition id* from our own stream, since Flower's node ids are random in every run;
* sampling waits until the nodes are there, so that round 1 is as large as the others;
* replies are aggregated in the order of partition ids, whatever the order of arrival, so sums are the same bit for bit;
* integers (batch counters) are taken from the first client, never averaged into floats;
* what a plan calls pooled is pooled by the law of total variance;
* a reply with NaN or infinity is rejected and counted, and the round goes on with the others;
* :meth:`NormStrategy.start` can start at any round, and reports every client of every round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fednorm.constants import constant_prints, differing
from fednorm.errors import AggregationError, ConfigError
from fednorm.federated.aggregation import Average, reject_metrics, reject_reason
from fednorm.federated.wire import nbytes, pack, unpack
from fednorm.plan import NormPlan, norm_plan
from fednorm.rng import stream
from fednorm.roles import RoleRule

NODE_SECONDS = 120.0
"""How long to wait for the nodes of a run."""


@dataclass(frozen=True)
class Node:
    """One client as the server knows it: how to reach it, and what it said of itself."""

    node_id: int
    partition_id: int
    domain: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class ClientReport:
    """What one client reported in one round."""

    partition_id: int
    domain: str
    metrics: Mapping[str, float]


@dataclass
class RoundReport:
    """What happened in one round.

    Attributes:
        server_round: The round, from 1.
        sampled: Partition ids of the clients that were asked to train.
        train: What those reported that trained.
        evaluate: What those reported that evaluated; empty in rounds without evaluation.
        rejected: Partition id and reason of every reply that was not used.
        bytes_down: Bytes of tensors sent to clients for training.
        bytes_up: Bytes of tensors received from them.
        seconds: Wall-clock time of the round.
        statistics: Running statistics that travelled with each reply that was used, by partition id; in rounds that
            are evaluated.
    """

    server_round: int
    sampled: tuple[int, ...] = ()
    train: list[ClientReport] = field(default_factory=list)
    evaluate: list[ClientReport] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    statistics: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class Common(TypedDict, total=False):
    """The arguments that every strategy takes besides its own; see :class:`NormStrategy`."""

    fraction: float
    weighting: str
    seed: int
    min_nodes: int


class NormStrategy(Strategy):
    """Federated averaging by a norm plan; the base of every strategy here.

        w <- sum_k p_k w_k,   p_k = n_k / sum_j n_j  ("examples")  or  1 / K  ("equal")

    Args:
        model: The network, for its plan: which tensors are shared, local, pooled, reset, constant.
        fraction: Share of the clients sampled each round, in (0, 1]; at least one is.
        weighting: ``examples`` or ``equal``.
        seed: Of the stream that samples clients.
        min_nodes: Nodes to wait for before the first round.

    Raises:
        RoleError: The plan cannot place a tensor, or the strategy would do nothing on this model.
        ConfigError: An argument is out of range.
    """

    rule: ClassVar[RoleRule] = RoleRule()

    def __init__(
        self,
        model: nn.Module,
        *,
        fraction: float = 1.0,
        weighting: str = "examples",
        seed: int = 0,
        min_nodes: int = 1,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction is the share of clients sampled each round, in (0, 1]; got {fraction}.")
        if weighting not in ("examples", "equal"):
            raise ConfigError(f"weighting is 'examples' or 'equal'; got {weighting!r}.")
        self.fraction = fraction
        self.weighting = weighting
        self.seed = seed
        self.min_nodes = min_nodes
        self.nodes: tuple[Node, ...] = ()
        self.report = RoundReport(0)
        self._sent: dict[str, Tensor] = {}
        self._awaited: list[int] = []
        self._keeps_statistics = False
        self.check(model)
        self.plan: NormPlan = norm_plan(model, self.role_rule())
        self._constants = constant_prints(model, self.plan)
        self._unlike: dict[int, str] = {}
        self._travelling = tuple(key for pair in self.plan.moments() for key in pair if key in self.plan.sent)

    # What a strategy may override -------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Raise a FedNormError if the strategy makes no sense on this model."""

    def role_rule(self) -> RoleRule:
        """Return the map from kinds to roles, the strategy's options taken into account."""
        return self.rule

    def client_config(self) -> Mapping[str, float]:
        """Return what the clients must know to train; it travels with every training message."""
        return {}

    def server_update(self, old: Mapping[str, Tensor], mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the next server tensors from the present ones and the clients' average."""
        del old
        return mean

    def state_dict(self) -> dict[str, Tensor]:
        """Return the strategy's own tensors (of a server optimizer), for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` returned."""
        if state:
            raise ConfigError(
                f"{type(self).__name__} keeps no tensors of its own; the checkpoint has {', '.join(state)}."
            )

    # Flower's verbs ---------------------------------------------------------------------------------------------

    def initial_arrays(self, model: nn.Module) -> ArrayRecord:
        """Return the tensors of ``model`` that the server holds: those that travel, and no others."""
        state = model.state_dict()
        return pack({key: state[key].clone() for key in self.plan.sent})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample this round's clients and address the shared tensors to them."""
        chosen = self._sample(grid, server_round)
        self.report = RoundReport(server_round, sampled=tuple(node.partition_id for node in chosen))
        self.report.bytes_down = nbytes(arrays.values()) * len(chosen)
        self._sent = unpack(arrays)
        settings = ConfigRecord({**config, **self.client_config(), "server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": settings})
        return self._address(content, "train", chosen)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what came back, in the order of partition ids; (None, None) where nothing usable did."""
        del server_round
        average = Average(self.plan)
        for node, reply in self._in_order(replies):
            reason = self._unlike.get(node.partition_id) or reject_reason(reply, self.plan)
            if reason:
                self.report.rejected.append((node.partition_id, reason))
                continue
            arrays, metrics = _arrays(reply), _metrics(reply)
            self.report.bytes_up += nbytes(arrays.values())
            self.report.train.append(ClientReport(node.partition_id, node.domain, metrics))
            tensors = unpack(arrays)
            if self._keeps_statistics:
                self.report.statistics[node.partition_id] = {key: tensors[key] for key in self._travelling}
            average.add(tensors, metrics["num-examples"] if self.weighting == "examples" else 1.0)
        if not self.report.train:
            return None, None
        return pack(self.server_update(self._sent, average.result())), _weighted_metrics(self.report.train)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the shared tensors to every client that took part in the federation."""
        self.discover(grid)
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "server-round": server_round})})
        return self._address(content, "evaluate", [node for node in self.nodes if not node.held_out])

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect every client's metrics, and return their average weighted by test images."""
        del server_round
        for node, reply in self._in_order(replies):
            if reason := self._unlike.get(node.partition_id) or reject_metrics(reply):
                self.report.rejected.append((node.partition_id, f"evaluation failed: {reason}"))
            else:
                self.report.evaluate.append(ClientReport(node.partition_id, node.domain, _metrics(reply)))
        return _weighted_metrics(self.report.evaluate) if self.report.evaluate else None

    def summary(self) -> None:
        """Log nothing: the norm plan is shown before training instead."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        first_round: int = 1,
        evaluate_every: int = 1,
        on_round: Callable[[RoundReport, ArrayRecord], None] | None = None,
    ) -> Result:
        """Run rounds ``first_round`` to ``num_rounds``.

        Args:
            grid: The way to the clients.
            initial_arrays: The server's tensors before ``first_round``.
            num_rounds: The last round.
            timeout: Seconds to wait for a round's replies.
            train_config: Sent with every training message.
            evaluate_config: Sent with every evaluation message.
            evaluate_fn: Evaluates the server's tensors centrally, before the first round and after each.
            first_round: The first round: 1, or later to go on from a checkpoint.
            evaluate_every: Evaluate each so many rounds, and after the last.
            on_round: Called after every round with its report and the new tensors.

        Returns:
            Flower's ``Result``.

        Raises:
            AggregationError: No client of a round sent a usable reply.
        """
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        result, arrays = Result(), initial_arrays
        result.arrays = arrays
        if evaluate_fn and (metrics := evaluate_fn(first_round - 1, arrays)) is not None:
            result.evaluate_metrics_serverapp[first_round - 1] = metrics
        for current in range(first_round, num_rounds + 1):
            began = time.perf_counter()
            evaluated = current % evaluate_every == 0 or current == num_rounds
            self._keeps_statistics = evaluated
            messages = self.configure_train(current, arrays, train_config, grid)
            new, train_metrics = self.aggregate_train(current, grid.send_and_receive(messages, timeout=timeout))
            if new is None:
                raise AggregationError(_nothing_usable(self.report))
            result.arrays = arrays = new
            if train_metrics is not None:
                result.train_metrics_clientapp[current] = train_metrics
            if evaluated:
                messages = self.configure_evaluate(current, arrays, evaluate_config, grid)
                metrics = self.aggregate_evaluate(current, grid.send_and_receive(messages, timeout=timeout))
                if metrics is not None:
                    result.evaluate_metrics_clientapp[current] = metrics
                if evaluate_fn and (metrics := evaluate_fn(current, arrays)) is not None:
                    result.evaluate_metrics_serverapp[current] = metrics
            self.report.seconds = time.perf_counter() - began
            if on_round:
                on_round(self.report, arrays)
        return result

    # Nodes --------------------------------------------------------------------------------------------------------

    def discover(self, grid: Grid) -> None:
        """Wait for the nodes and ask each for its partition id and domain, once.

        Raises:
            AggregationError: Too few nodes came.
        """
        if self.nodes:
            return
        waited_until = time.monotonic() + NODE_SECONDS
        while len(ids := sorted(grid.get_node_ids())) < self.min_nodes:
            if time.monotonic() > waited_until:
                raise AggregationError(
                    f"The run has {self.min_nodes} clients, and {len(ids)} nodes came within {NODE_SECONDS:.0f} s. "
                    f"With flwr run: --federation-config 'num-supernodes={self.min_nodes}'."
                )
            time.sleep(0.2)
        ask = [Message(RecordDict(), dst_node_id=node_id, message_type="query.describe") for node_id in ids]
        replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(ask, timeout=600)}
        nodes = [_node(node_id, rank, replies.get(node_id)) for rank, node_id in enumerate(ids)]
        self.nodes = tuple(sorted(nodes, key=lambda node: node.partition_id))
        self._compare_constants(replies)

    def _compare_constants(self, replies: Mapping[int, Message]) -> None:
        """Reject, from now on, every client whose model has another constant than the server's; a silent one counts."""
        for node in self.nodes:
            reply = replies.get(node.node_id)
            if reply is None or reply.has_error() or "constants" not in reply.content.metric_records:
                continue
            if key := differing(self._constants, reply.content.metric_records["constants"]):
                self._unlike[node.partition_id] = (
                    f"the constant {key} of its model is not the server's. Constants are never sent: build both models "
                    "alike, seed and versions included, or declare the tensor a 'weight' (fednorm.declare_tensors)"
                )

    def _address(self, content: RecordDict, message_type: str, nodes: Sequence[Node]) -> list[Message]:
        self._awaited = [node.partition_id for node in nodes]
        return [Message(content, dst_node_id=node.node_id, message_type=message_type) for node in nodes]

    def _sample(self, grid: Grid, server_round: int) -> list[Node]:
        self.discover(grid)
        nodes = [node for node in self.nodes if not node.held_out]
        if self.fraction == 1:
            return nodes
        size = max(1, round(self.fraction * len(nodes)))
        chosen = stream(self.seed, "sample", "round", server_round).choice(len(nodes), size=size, replace=False)
        return [nodes[i] for i in sorted(chosen)]

    def _in_order(self, replies: Iterable[Message]) -> Iterator[tuple[Node, Message]]:
        """Yield replies by partition id, each as soon as all before it are there; stragglers' gaps close at the end."""
        nodes = {node.node_id: node for node in self.nodes}
        waiting: dict[int, tuple[Node, Message]] = {}
        awaited = iter(self._awaited)
        following = next(awaited, None)
        for reply in replies:
            node = nodes[reply.metadata.src_node_id]
            waiting[node.partition_id] = (node, reply)
            while following in waiting:
                yield waiting.pop(following)
                following = next(awaited, None)
        for partition_id in sorted(waiting):
            yield waiting[partition_id]


def _node(node_id: int, rank: int, reply: Message | None) -> Node:
    """Read a node's description; a ClientApp that is not ours has none, and is numbered by its node id's rank."""
    if reply is None or reply.has_error() or "client" not in reply.content.config_records:
        return Node(node_id, rank)
    about = reply.content.config_records["client"]
    return Node(node_id, int(str(about["partition-id"])), str(about["domain"]), bool(about["held-out"]))


def _arrays(reply: Message) -> ArrayRecord:
    return next(iter(reply.content.array_records.values()))


def _metrics(reply: Message) -> dict[str, float]:
    record = next(iter(reply.content.metric_records.values()))
    return {key: value for key, value in record.items() if isinstance(value, int | float)}


def _weighted_metrics(reports: Iterable[ClientReport]) -> MetricRecord:
    """Average each metric over clients, weighted by their examples; NaN where there are no examples at all."""
    reports = list(reports)
    total = sum(report.metrics["num-examples"] for report in reports)
    keys = [key for key in reports[0].metrics if key != "num-examples"]
    return MetricRecord(
        {
            key: sum(report.metrics["num-examples"] * report.metrics.get(key, math.nan) for report in reports) / total
            if total
            else math.nan
            for key in keys
        }
    )


def _nothing_usable(report: RoundReport) -> str:
    reasons = "; ".join(f"client {partition_id}: {reason}" for partition_id, reason in report.rejected[:3])
    return (
        f"Round {report.server_round}: none of the {len(report.sampled)} sampled clients sent a usable update "
        f"({reasons or 'no reply at all'}). The record keeps the last good round; "
        "a smaller train.learning_rate, or clipping (train.agc), often helps where losses became NaN."
    )
