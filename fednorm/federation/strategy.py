"""What every strategy of fednorm shares: a Flower ``Strategy`` that knows what its tensors are.

Differences from ``flwr.serverapp.strategy.FedAvg``, each the closing of a trap:

* clients are sampled by *partition id* from our own stream, since Flower's node ids are random in every run;
* sampling waits until the nodes are there, so that round 1 is as large as the others;
* replies are aggregated in the order of partition ids, whatever the order of arrival, so sums are the same bit for bit;
* integers (batch counters) are taken from the first client, never averaged into floats;
* what a plan calls pooled is pooled by the law of total variance;
* a reply that does not fit the plan (:mod:`fednorm.federation.replies`) is rejected and counted, the round goes on
  with the others, and its client keeps nothing of the round (:mod:`fednorm.federation.undo`);
* :meth:`NormStrategy.start` can start at any round, and reports every client of every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, TypedDict

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fednorm.config import ALL_CLIENTS
from fednorm.errors import AggregationError, ConfigError, DivergedError, IncompleteError, RoleError
from fednorm.federation.aggregation import Average, all_finite
from fednorm.federation.constants import constant_prints
from fednorm.federation.evaluated import evaluated
from fednorm.federation.flat import flattened
from fednorm.federation.local import Local
from fednorm.federation.nodes import KnownNodes, Node, addressed, discover, wait_for_nodes
from fednorm.federation.plan import NormPlan, norm_plan
from fednorm.federation.replies import (
    EXTRA,
    Cause,
    Expected,
    Form,
    UnfitReply,
    Update,
    in_order,
    read_scores,
    read_update,
)
from fednorm.federation.round_report import ClientReport, RoundReport, shown, weighted_metrics
from fednorm.federation.stack import some_of
from fednorm.federation.update_norm import suspect, update_norm
from fednorm.federation.wire import nbytes, pack, unpack
from fednorm.recognition.places import patterns_of
from fednorm.rng import stream
from fednorm.roles import LEARNED, Role, RoleRule

NODE_SECONDS = 120.0
"""How long to wait for the nodes of a run."""

UNDO_SECONDS = 60.0
"""How long to wait for clients that are told that their training was not used."""

OURS = ("loss", "accuracy")
"""The metrics that fednorm's own clients report besides ``num-examples``."""


class Common(TypedDict, total=False):
    """The arguments that every strategy takes besides its own; see :class:`NormStrategy`."""

    fraction: float
    weighting: str
    seed: int
    min_nodes: int
    max_update_norm: float
    local: str
    frozen: frozenset[str]


def _always(*_: int) -> bool:
    return True


class NormStrategy(Strategy):
    """Federated averaging by a norm plan; the base of every strategy here.

        w <- sum_k p_k w_k,   p_k = n_k / sum_j n_j  ("examples")  or  1 / K  ("equal")

    Args:
        model: The network, for its plan: which tensors are shared, local, pooled, reset, constant.
        fraction: Share of the clients sampled each round, in (0, 1]; at least one is.
        weighting: ``examples`` or ``equal``.
        seed: Of the stream that samples clients.
        min_nodes: Nodes to wait for before the first round.
        max_update_norm: A client is rejected whose update, ||w_k - w||_2 over every float tensor that travels, is
            longer; 0 for no limit.
        local: What stays on its client besides what the strategy keeps there: patterns
            (:mod:`fednorm.recognition.places`), separated by commas, e.g. ``head`` or ``fc3.*``.
        frozen: Keys of what the run never trains (``train.trainable``): constants, which are not sent.

    Attributes:
        local: The class of the clients' side (:mod:`fednorm.federation.local`).
        silent: Whether it is meant that nothing is sent at all.
        expected: What a run knows of its clients, by partition id; empty where it knows nothing. Replies are held
            against it.
        norms: The norms of the last round's updates, by partition id.
        renew: How the nodes of a round are found, in a run where they come and go.
        num_rounds: The rounds of the whole run, on the server and on the clients; 0 where nobody has said.
        num_experiences: The experiences that they are dealt to, as many to each.
        evaluates: Which clients are evaluated (``evaluate.clients``).

    Raises:
        RoleError: The plan cannot place a tensor, or the strategy would do nothing on this model.
        ConfigError: An argument is out of range, or a pattern matches nothing.
    """

    rule: ClassVar[RoleRule] = RoleRule()
    local: ClassVar[type[Local]] = Local
    silent: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        fraction: float = 1.0,
        weighting: str = "examples",
        seed: int = 0,
        min_nodes: int = 1,
        max_update_norm: float = 0.0,
        local: str = "",
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction is the share of clients sampled each round, in (0, 1]; got {fraction}.")
        if weighting not in ("examples", "equal"):
            raise ConfigError(f"weighting is 'examples' or 'equal'; got {weighting!r}.")
        if not max_update_norm >= 0:
            raise ConfigError(f"max_update_norm is a norm, or 0 for no limit; got {max_update_norm}.")
        self.fraction = fraction
        self.weighting = weighting
        self.seed = seed
        self.min_nodes = min_nodes
        self.max_update_norm = max_update_norm
        self.expected: Mapping[int, Expected] = {}
        self.takes_part: Callable[[int, int], bool] = _always
        self.norms: dict[int, float] = {}
        self.num_rounds, self.num_experiences = 0, 1
        self.evaluates = ALL_CLIENTS
        self.nodes: tuple[Node, ...] = ()
        self._known = KnownNodes(())
        self.report = RoundReport(0)
        self._sent: dict[str, Tensor] = {}
        self._sent_flat: Tensor | None = None
        self._grid: Grid | None = None
        self.renew: Callable[[], tuple[Node, ...]] | None = None
        self._awaited: list[int] = []
        self._refused: list[tuple[int | None, UnfitReply]] = []
        self._keeps_statistics = False
        self.check(model)
        self.plan: NormPlan = norm_plan(model, self.role_rule().keeping(*patterns_of(local)).freezing(frozen))
        self._require_something_to_send()
        self._constants = constant_prints(model, self.plan)
        self._travelling = tuple(key for pair in self.plan.moments() for key in pair if key in self.plan.sent)

    # What a strategy may override -------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Raise a FedNormError if the strategy makes no sense on this model."""

    def role_rule(self) -> RoleRule:
        """Return the map from kinds to roles, the strategy's options taken into account."""
        return self.rule

    def client_config(self) -> Mapping[str, float | list[float]]:
        """Return what the clients must know to train; it travels with every training message."""
        return {}

    def extra_to_send(self) -> Mapping[str, Tensor]:
        """Return what every training message brings besides the plan's tensors; ``Turn.extra`` on the client."""
        return {}

    def extra_expected(self) -> Mapping[str, Form]:
        """Declare what a client sends besides the plan's tensors: :meth:`Local.end` must return exactly this."""
        return {}

    def bytes_beside(self) -> int:
        """Return the bytes of each client of a round in exchanges of the strategy's own, beside the training's."""
        return 0

    def summary_of_plan(self, num_clients: int) -> dict[str, int]:
        """Return the plan's summary, with the bytes that travel beside its tensors: the strategy's own.

        Args:
            num_clients: Clients of a round.
        """
        summary = self.plan.summary(num_clients)
        return summary | {"bytes_per_round": summary["bytes_per_round"] + num_clients * self.extra_bytes}

    @property
    def extra_bytes(self) -> int:
        """The bytes that each client of a round receives and sends beside the plan's tensors, once each."""
        forms = [*map(Form.of, self.extra_to_send().values()), *self.extra_expected().values()]
        return sum(form.nbytes for form in forms) + self.bytes_beside()

    def aggregate_extra(self, partition_id: int, extra: Mapping[str, Tensor], weight: float) -> None:
        """Take in what one client sent besides, before :meth:`server_update`; called in the order of partition ids.

        Args:
            partition_id: The client.
            extra: As :meth:`extra_expected` declares it, checked; not to be written to.
            weight: The client's weight in the average of the plan's tensors, n_k or 1.
        """

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

    def ends_experience(self, server_round: int) -> bool:
        """Return whether a round is the last of an experience, as far as anybody has said how many there are."""
        each = self.num_rounds // self.num_experiences
        return each > 0 and server_round % each == 0

    def _require_something_to_send(self) -> None:
        if self.plan.sent or self.silent:
            return
        what, remedy = "every tensor of this model", "Keep fewer (strategy.local), use a model with more layers"
        if any(entry.role is Role.CONSTANT and entry.kind in LEARNED for entry in self.plan.entries):
            what, remedy = "all that train.trainable trains", "Train the head too (train.trainable = 'norm,head')"
        raise RoleError(
            f"{type(self).__name__} would keep {what} on its client: nothing would be averaged. {remedy}, or strategy "
            "'local', which means it."
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
        while self._refused:  # nodes that could not be taken on; the first round tells of them
            self.report.reject(*self._refused.pop(0), during="query.describe")
        beside = pack(self.extra_to_send())
        self.report.bytes_down = (nbytes(arrays.values()) + nbytes(beside.values())) * len(chosen)
        self._sent, self._grid = unpack(arrays), grid
        # In the plan's order, which a checkpoint does not keep.
        flat = flattened({key: self._sent[key] for key in self.plan.sent if key in self._sent})
        self._sent_flat = None if flat is None else flat.double()
        settings = ConfigRecord({**config, **self.client_config(), "server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": settings, **({EXTRA: beside} if beside else {})})
        return self._address(content, "train", chosen, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what came back, in the order of partition ids; (None, None) where nothing usable did."""
        del server_round
        average, norms = Average(self.plan), dict[int, float]()
        for node, reply in self._in_order(replies):
            try:
                update, report = self._read_update(node, reply)
            except UnfitReply as unfit:
                self.report.reject(node.partition_id, unfit)
                continue
            self.report.train.append(report)
            norms[node.partition_id] = report.update_norm or 0.0
            if self._keeps_statistics:
                self.report.statistics[node.partition_id] = some_of(update.tensors, self._travelling)
            weight = report.metrics["num-examples"] if self.weighting == "examples" else 1.0
            average.add(update.tensors, weight, update.flat)
            if update.extra:
                self.aggregate_extra(node.partition_id, update.extra, weight)
        self._take_back()
        if not self.report.train:
            return None, None
        self.norms = norms
        return pack(self.server_update(self._sent, average.result())), weighted_metrics(self.report.train)

    def _take_back(self) -> None:
        """Tell the clients whose training was not used, so that they keep nothing of it (see ``undo``)."""
        used = {report.partition_id for report in self.report.train}
        lost = set(self.report.sampled) - used
        nodes = [node for node in self.nodes if node.partition_id in lost and node.described] if lost else []
        if nodes and self._grid is not None:
            content = RecordDict({"config": ConfigRecord({"server-round": self.report.server_round})})
            for _ in self._grid.send_and_receive(self._address(content, "query.undo", nodes), timeout=UNDO_SECONDS):
                pass  # one that does not hear of it, or knows nothing of it, cannot be helped

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the shared tensors to the clients of the federation that are evaluated, by default to all."""
        self.discover(grid)
        self.report.evaluated = True
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "server-round": server_round})})
        nodes = evaluated(
            self.known.seen, self.evaluates, sampled=self.report.sampled, expected=self.expected, seed=self.seed
        )
        if self.evaluates != ALL_CLIENTS:
            self.report.scored = tuple(node.partition_id for node in nodes)
        return self._address(content, "evaluate", nodes, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect every client's metrics, and return their average weighted by test images."""
        del server_round
        for node, reply in self._in_order(replies, during="evaluation"):
            expected = self.expected.get(node.partition_id)
            ours = expected if node.described else None
            required = OURS if ours else OURS[1:] if expected else ()
            shares = node.described or expected is not None
            try:
                scores = read_scores(reply, required=required, images=ours.scored if ours else None, shares=shares)
            except UnfitReply as unfit:
                self.report.reject(node.partition_id, unfit, during="evaluation")
            else:
                self.report.evaluate.append(ClientReport(node.partition_id, node.domain, scores))
        return weighted_metrics(self.report.evaluate) if self.report.evaluate else None

    def summary(self) -> None:
        """Log nothing: the plan is shown before training."""

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
            DivergedError: No client of a round sent finite numbers any more, or their average is not finite.
            IncompleteError: No client of a round sent a usable reply, for other reasons.
        """
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        result, arrays = Result(), initial_arrays
        result.arrays = arrays
        if evaluate_fn and (metrics := evaluate_fn(first_round - 1, arrays)) is not None:
            result.evaluate_metrics_serverapp[first_round - 1] = metrics
        for current in range(first_round, num_rounds + 1):
            began = time.perf_counter()
            evaluated = current % evaluate_every == 0 or current == num_rounds
            self._keeps_statistics = evaluated or self.ends_experience(current)
            messages = self.configure_train(current, arrays, train_config, grid)
            new, train_metrics = self.aggregate_train(current, grid.send_and_receive(messages, timeout=timeout))
            if new is None:
                raise self._nothing_usable()
            self._require_finite(new)
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
            AggregationError: Too few nodes came, or none of them can be taken on.
        """
        if not self.nodes:
            wait_for_nodes(grid, self.min_nodes, NODE_SECONDS)
            self.nodes, self._refused = discover(grid, self.expected, self._constants)

    def _address(self, content: RecordDict, kind: str, to: Sequence[Node], grid: Grid | None = None) -> list[Message]:
        self._awaited = [node.partition_id for node in to]
        return addressed(grid or self._grid, content, kind, to)

    def _sample(self, grid: Grid, server_round: int) -> list[Node]:
        self.nodes = self.renew() if self.renew else self.nodes
        self.discover(grid)
        nodes = self.known.trainers
        if not nodes:
            raise IncompleteError(f"None of the {len(self.nodes)} clients of this run trains: all are held out.")
        if self.takes_part is not _always:
            nodes = [node for node in nodes if self.takes_part(node.partition_id, server_round)]
        if self.fraction == 1:
            return list(nodes)
        size = max(1, round(self.fraction * len(nodes)))
        chosen = stream(self.seed, "sample", "round", server_round).choice(len(nodes), size=size, replace=False)
        return [nodes[i] for i in sorted(chosen)]

    @property
    def known(self) -> KnownNodes:
        """The nodes by what they do, found once."""
        if self._known.nodes is not self.nodes:
            self._known = KnownNodes(self.nodes)
        return self._known

    @property
    def trainers(self) -> list[Node]:
        """The nodes that train: those that are not held out and have something to train on, as far as is known."""
        return list(self.known.trainers)

    def _in_order(self, replies: Iterable[Message], during: str = "") -> Iterator[tuple[Node, Message]]:
        def reject(partition_id: int | None, unfit: UnfitReply) -> None:
            self.report.reject(partition_id, unfit, during)

        return in_order(replies, self.known.by_id, self._awaited, reject)

    def _read_update(self, node: Node, reply: Message) -> tuple[Update, ClientReport]:
        """Return what a client sent, and what it reported, or raise UnfitReply."""
        ours = self.expected.get(node.partition_id) if node.described else None
        update = read_update(
            reply,
            self.plan,
            required=OURS if ours else (),
            examples=ours.train if ours and ours.constant else 0,
            shares=node.described or bool(self.expected),
            extra=self.extra_expected(),
        )
        norm = update_norm(update.tensors, self._sent, update.flat, self._sent_flat)
        if self.max_update_norm and not norm <= self.max_update_norm:
            limit = f"the limit, rounds.max_update_norm, is {self.max_update_norm:g}"
            raise UnfitReply(f"the norm of its update is {norm:.4g}, and {limit}", Cause.NORM)
        self.report.bytes_up += update.nbytes
        return update, ClientReport(node.partition_id, node.domain, update.metrics, norm)

    # Rounds that cannot be gone on from ---------------------------------------------------------------------------

    def _nothing_usable(self) -> AggregationError:
        """Return the error of a round in which no client sent a usable update, with the remedy for what they sent."""
        report = self.report
        text = (
            f"Round {report.server_round}: none of the {len(report.sampled)} sampled clients sent a usable update "
            f"({shown(report.rejected) or 'no reply at all'})"
        )
        causes = [cause for cause, _ in report.causes.most_common()]
        if causes and causes[0] is Cause.DIVERGED:
            return DivergedError(
                f"{text}: the federation diverged: the loss is not a number from round {report.server_round} on. "
                f"The record keeps the last good round. {self.remedy(report.server_round - 1)}"
            )
        remedies = "; ".join(causes)
        return IncompleteError(f"{text}. The record keeps the last good round{'; ' if remedies else ''}{remedies}.")

    def _require_finite(self, arrays: ArrayRecord) -> None:
        """Refuse server tensors that no client could go on from, though every update was finite."""
        if all_finite(unpack(arrays).values()):
            return
        number = self.report.server_round
        raise DivergedError(
            f"Round {number}: every update that was used is finite, and the server's tensors made of them are not: the "
            f"federation diverged: the loss is not a number from round {number + 1} on. The record keeps the last good "
            f"round. {self.remedy(number)}"
        )

    def remedy(self, server_round: int) -> str:
        """Return what helps against numbers that are none any more, after a round's updates were averaged."""
        return suspect(self.norms, server_round) or f"{Cause.DIVERGED[:1].upper()}{Cause.DIVERGED[1:]}."
