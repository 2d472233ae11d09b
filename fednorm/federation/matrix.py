"""The evaluation matrix: each domain under its own, every other client's, averaged, pooled and re-estimated statistics.

The question FedBN's users ask most: which model is tested, and what becomes of a domain that trained no model? Scoring
happens on the clients, which hold the test images; the server sends the tensors to be scored. Where other clients'
local tensors are needed, they are asked for once, after training (``query.local``), and only for the evaluations that
need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fednorm.config import ALL_CLIENTS, EvaluateConfig
from fednorm.data.domain import Federation
from fednorm.errors import ConfigError, IncompleteError
from fednorm.federation.answers import answers, enough
from fednorm.federation.evaluated import require_evaluated
from fednorm.federation.local import Local
from fednorm.federation.nodes import Node, asked
from fednorm.federation.plan import NormPlan
from fednorm.federation.pooling import pool_moments
from fednorm.federation.replies import EXTRA, Expected, Form, UnfitReply, read_local, read_measured, read_scores
from fednorm.federation.round_report import shown
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import pack, unpack
from fednorm.roles import STATISTICS

Scores = dict[str, Any]
T = TypeVar("T")

NO_STATISTICS = "the network has no running statistics"
NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Base:
    """A network to be evaluated.

    Attributes:
        tensors: What the server sends of it.
        mode: Under which local tensors a client evaluates; see :mod:`fednorm.federation.client`.
        fallback: What stands in for local tensors that an unseen domain does not have; empty for nothing.
    """

    tensors: Mapping[str, Tensor]
    mode: str
    fallback: str = ""


def check_evaluations(config: EvaluateConfig, plan: NormPlan, federation: Federation, strategy: str) -> None:
    """Refuse, before training, an evaluation that could not be made after it.

    Raises:
        ConfigError: ``unseen`` without a held-out domain, or for a strategy whose server model is not usable there.
    """
    counts = federation.counts
    scored = (counts.validation if config.split == "validation" else counts.test) > 0
    require_evaluated(
        config.clients,
        [counts.domains[place] for place in sorted(set(counts.domain[scored & ~counts.held_out].tolist()))],
    )
    adapts_unseen = bool(config.adaptation) and bool(counts.held_out.any())
    if "unseen" in config.kinds or adapts_unseen:
        if not counts.held_out.any():
            raise ConfigError(
                "evaluate.kinds has 'unseen', and no domain is held out of training. "
                f"Set data.held_out to one of {', '.join(federation.domains)}."
            )
        if plan.local and config.fallback == "refuse":
            raise ConfigError(
                f"Strategy {strategy!r} keeps {len(plan.local)} tensors on the clients ({plan.local[0]}, …), so its "
                "server model has none for an unseen domain and cannot be evaluated there. Name the tensors to use "
                "instead: evaluate.fallback = 'pooled', 'averaged' or 'reestimated'; or leave "
                f"{'evaluate.adaptation' if adapts_unseen else repr('unseen')} out."
            )
        if plan.local and config.fallback in ("pooled", "reestimated") and not _has_statistics(plan):
            raise ConfigError(
                f"evaluate.fallback is {config.fallback!r}, and the network has no running statistics. Use 'averaged'."
            )
    if config.best_round and config.split == "validation":
        raise ConfigError(
            "evaluate.best_round reports test images at the round that is best on the images held back; with "
            "evaluate.split = 'validation' no test image is scored. Leave one of the two out."
        )
    if config.best_round and not federation.counts.validation.any():
        raise ConfigError(
            "evaluate.best_round chooses by images held back, and data.validation holds none back. Set it, e.g. to 0.2."
        )
    if config.split == "validation" and not federation.counts.validation.any():
        raise ConfigError(
            "evaluate.split is 'validation', and data.validation holds no images back. Set it, e.g. to 0.2."
        )


class EvaluationMatrix:
    """Scores a trained federation under several choices of the tensors that its plan keeps local.

    Args:
        strategy: The strategy, after training: its plan and its nodes.
        grid: The way to the clients.
        arrays: The server's tensors.
        config: Which evaluations, and their settings.
        own: The scores of ``own``, where the last round's evaluation has made them already.
        min_answered: Share of the clients that must answer (``rounds.min_answered``).
        seen: The clients to evaluate (``evaluate.clients``); None for all that do not only evaluate.

    Attributes:
        bytes_of_locals: Bytes of the local tensors that clients sent for it.
        rejected: What was asked, partition id and reason of every reply that was not used.
    """

    def __init__(
        self,
        strategy: NormStrategy,
        grid: Grid,
        arrays: ArrayRecord,
        config: EvaluateConfig,
        own: Scores | None = None,
        *,
        min_answered: float = 1.0,
        seen: Sequence[Node] | None = None,
    ) -> None:
        self._asked = seen
        self._known, self._least = own, min_answered
        self._strategy, self._grid, self._config = strategy, grid, config
        self._shared = unpack(arrays)
        self._plan = strategy.plan
        self._locals: dict[int, tuple[float, dict[str, Tensor]]] | None = None
        self._kind = ""
        self.bytes_of_locals = 0
        self.rejected: list[tuple[str, int | None, str]] = []

    def run(self) -> Scores:
        """Return, for each evaluation asked for, its scores by domain, or ``not_applicable`` with the reason.

        Scores that lack clients have ``answered`` and ``missing`` beside them.

        Raises:
            IncompleteError: Fewer clients answered than ``min_answered`` asks for.
        """
        makers: dict[str, Callable[[], Scores]] = {
            "own": self._own,
            "cross": self._cross,
            "averaged": lambda: self._given("averaged"),
            "pooled": lambda: self._given("pooled"),
            "reestimated": self._reestimated,
            "unseen": self._unseen,
        }
        made: Scores = {}
        for self._kind in (kind for kind in makers if kind in self._config.kinds):
            made[self._kind] = makers[self._kind]()
        return made

    def rejected_replies(self) -> list[Scores]:
        """Return, as a result has it, every reply that was not used."""
        return [{"evaluation": what, "client": pid, "reason": reason} for what, pid, reason in self.rejected]

    def _own(self) -> Scores:
        if self._known:
            return self._known
        return self._scores(self._seen(), self._shared, mode="own")

    def _cross(self) -> Scores:
        if reason := self._not_exchanged():
            return _not_applicable(reason)
        names = {node.partition_id: node for node in self._strategy.nodes}
        return {
            "under": {
                f"{names[pid].domain} (client {pid})": self._scores(self._seen(), self._shared | tensors, mode="given")
                for pid, (_, tensors) in self._local_tensors().items()
            }
        }

    def _given(self, how: str) -> Scores:
        if reason := self._not_exchanged():
            return _not_applicable(reason)
        if how == "pooled" and not _has_statistics(self._plan):
            return _not_applicable(NO_STATISTICS)
        return self._scores(self._seen(), self._shared | self._combined(how), mode="given")

    def _reestimated(self) -> Scores:
        if not _has_statistics(self._plan):
            return _not_applicable(NO_STATISTICS)
        return self._scores(self._seen(), self._shared, mode="reestimated")

    def _unseen(self) -> Scores:
        base = self.base_of_unseen()
        scores = self._scores(self.held_out, base.tensors, mode=base.mode)
        return scores | ({"with": base.fallback} if base.fallback else {})

    @property
    def held_out(self) -> list[Node]:
        """The clients whose domain nobody trains on."""
        return [node for node in self._strategy.nodes if node.held_out]

    def base_of_unseen(self) -> Base:
        """Return the network that an unseen domain is evaluated with, as ``evaluate.fallback`` has it."""
        if not self._plan.local:
            return Base(self._shared, "given")
        fallback = self._config.fallback
        combined = self._combined("averaged" if fallback == "reestimated" else fallback)
        return Base(self._shared | combined, "reestimated" if fallback == "reestimated" else "given", fallback)

    @property
    def base_of_own(self) -> Base:
        """The network that a client of the federation is evaluated with: the server's tensors, and its own."""
        return Base(self._shared, "own")

    def seen(self) -> Sequence[Node]:
        """Return the clients of the federation that are evaluated."""
        return self._seen()

    def adapted(
        self, kind: str, nodes: Sequence[Node], base: Base, number: int | None, knowledge: Mapping[str, Tensor]
    ) -> Scores:
        """Return the scores of a network that adapts itself on each client, or of one that does not.

        Args:
            kind: What an error calls the evaluation.
            nodes: Whose images are scored.
            base: The network.
            number: Which of ``evaluate.adaptation``, from 0; None for none.
            knowledge: What the method has learned before.

        Raises:
            IncompleteError: Fewer clients answered than ``min_answered`` asks for.
        """
        self._kind = kind
        if number is None:
            return self._scores(nodes, base.tensors, mode=base.mode)
        return self._scores(nodes, base.tensors, mode=base.mode, adaptation={"adaptation": number}, extra=knowledge)

    def refined(
        self, kind: str, base: Base, numbers: Mapping[str, int], knowledge: Mapping[str, Tensor]
    ) -> list[dict[str, Tensor]]:
        """Return what each training client makes of what an adaptation knows.

        Args:
            kind: What an error calls the evaluation.
            base: The network.
            numbers: Which adaptation, and which round of its learning.
            knowledge: What is known.

        Raises:
            IncompleteError: Fewer clients answered than ``min_answered`` asks for, or none.
        """
        self._kind = kind
        forms = {key: Form.of(tensor) for key, tensor in knowledge.items()}
        nodes = self._strategy.known.trainers
        content = self._content(base.tensors, base.mode, numbers, knowledge)
        replies = dict(self._ask(nodes, content, "query.refine", lambda _, reply: read_measured(reply, forms)))
        missing = [node for node in nodes if node not in replies]
        self._require(missing, len(nodes), "answered")
        if not replies:
            raise self._incomplete({node.partition_id for node in missing}, "answered")
        return list(replies.values())

    def _content(
        self, tensors: Mapping[str, Tensor], mode: str, numbers: Mapping[str, int], extra: Mapping[str, Tensor]
    ) -> RecordDict:
        config = ConfigRecord({"mode": mode, "images": self._config.images, **numbers})
        content = RecordDict({"arrays": pack(tensors), "config": config})
        if extra:
            content[EXTRA] = pack(extra)
        return content

    def _not_exchanged(self) -> str:
        """Return why local tensors are not exchanged; empty where they are."""
        if not self._plan.local:
            return self._nothing_local()
        silent = ", ".join(node.domain for node in self._seen() if not node.shows)
        return silent and f"{silent} keeps its local tensors to itself (allow-statistics of its node)"

    def _nothing_local(self) -> str:
        """Return why there are no local tensors to exchange."""
        if type(self._strategy).local.before_evaluation is not Local.before_evaluation:
            return "clients are tested with models of their own, of which no tensor is one of the plan's local ones"
        return "the strategy keeps no tensors on clients: every domain is tested with one model"

    def _seen(self) -> Sequence[Node]:
        return self._strategy.known.seen if self._asked is None else self._asked

    def _local_tensors(self) -> Mapping[int, tuple[float, dict[str, Tensor]]]:
        """Ask every client, once, for its local tensors; clients that never trained have none."""
        if self._locals is None:
            nodes, expected = self._strategy.known.seen, self._strategy.expected
            replies = dict(
                self._ask(
                    nodes,
                    RecordDict(),
                    "query.local",
                    lambda node, reply: read_local(
                        reply,
                        self._plan,
                        examples=expected[node.partition_id].train if node.described and expected else 0,
                    ),
                )
            )
            self._require([node for node in nodes if node not in replies], len(nodes), "sent its local tensors")
            self._locals = {node.partition_id: local for node, local in replies.items() if local is not None}
            self.bytes_of_locals = sum(t.nbytes for _, tensors in self._locals.values() for t in tensors.values())
            if not self._locals:
                raise IncompleteError(
                    f"The evaluation {self._kind!r} needs the clients' local tensors, and none of {len(nodes)} clients "
                    f"has any ({self._reasons() or 'none has trained'}). Leave it out of evaluate.kinds."
                )
        return self._locals

    def _combined(self, how: str) -> dict[str, Tensor]:
        """Return one set of local tensors made of all clients': averaged, or their moments pooled."""
        counts = [count for count, _ in self._local_tensors().values()]
        sets = [tensors for _, tensors in self._local_tensors().values()]
        total = sum(counts)
        combined: dict[str, Tensor] = {}
        for key in self._plan.local:
            first = sets[0][key]
            if first.is_floating_point():
                mean = sum((n / total) * tensors[key].double() for n, tensors in zip(counts, sets, strict=True))
                combined[key] = mean.to(first.dtype) if isinstance(mean, Tensor) else first
            else:
                combined[key] = first
        if how == "pooled":
            for mean_key, var_key in self._plan.moments():
                if mean_key in combined and var_key in combined:
                    mean, var = pool_moments([t[mean_key] for t in sets], [t[var_key] for t in sets], counts)
                    combined[mean_key] = mean.to(sets[0][mean_key].dtype)
                    combined[var_key] = var.to(sets[0][var_key].dtype)
        return combined

    def _scores(
        self,
        nodes: Iterable[Node],
        tensors: Mapping[str, Tensor],
        *,
        mode: str,
        adaptation: Mapping[str, int] = NOTHING,
        extra: Mapping[str, Tensor] = NOTHING,
    ) -> Scores:
        content = self._content(tensors, mode, adaptation, extra)
        nodes, expected = list(nodes), self._strategy.expected

        def read(node: Node, reply: Message) -> dict[str, float]:
            images = expected[node.partition_id].scored if node.described and expected else None
            return read_scores(reply, required=("accuracy",), images=images)

        scores = dict(self._ask(nodes, content, "evaluate", read))
        made = summarize(by_domain((n.domain, s["num-examples"], s["accuracy"]) for n, s in scores.items()))
        held_out = any(node.held_out for node in nodes)
        asked = expected or {n.partition_id: Expected(n.domain, n.held_out, train=1, scored=1) for n in nodes}
        if (
            self._config.clients != ALL_CLIENTS and not held_out
        ):  # of all, those whom the server refused are missing too
            asked = {node.partition_id: asked[node.partition_id] for node in nodes}
        standing = answers(asked, {node.partition_id for node in scores}, held_out=held_out).document()
        missing = standing["missing"]["clients"] if "missing" in standing else []
        if missing and not (made["per_domain"] and enough(standing, self._least)):
            raise self._incomplete(missing, "could be evaluated")
        return made | standing if missing else made

    def _require(self, missing: Sequence[Node], asked: int, what: str) -> None:
        """Refuse to go on without some of the clients, where too many of those that were asked are missing."""
        if missing and 1 - len(missing) / asked < self._least:
            raise self._incomplete({node.partition_id for node in missing}, what)

    def _incomplete(self, missing: Iterable[int], what: str) -> IncompleteError:
        clients = ", ".join(map(str, sorted(missing))) or "any of them"
        return IncompleteError(
            f"The evaluation {self._kind!r} cannot be made: not every client {what}; missing: {clients} "
            f"({self._reasons() or 'no reply'}). The record keeps the rounds. The same command again goes on from its "
            "checkpoint; --set rounds.min_answered=0 takes what came, or leave it out of evaluate.kinds."
        )

    def _reasons(self) -> str:
        return shown((partition_id, reason) for _, partition_id, reason in self.rejected[-3:])

    def _ask(
        self, nodes: Sequence[Node], content: RecordDict, message_type: str, read: Callable[[Node, Message], T]
    ) -> Iterator[tuple[Node, T]]:
        """Yield what each client answers; see :func:`~fednorm.federation.nodes.asked`."""

        def reject(partition_id: int | None, unfit: UnfitReply) -> None:
            self.rejected.append((f"{self._kind}, {message_type}", partition_id, unfit.reason))

        return asked(self._grid, content, message_type, nodes, read, reject)


def by_domain(scored: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Return each domain's accuracy over all its clients' images; domains without images are left out.

    Args:
        scored: Domain, number of images and accuracy of each client.
    """
    hits: dict[str, float] = {}
    counts: dict[str, float] = {}
    for domain, count, accuracy in scored:
        hits[domain] = hits.get(domain, 0.0) + count * accuracy
        counts[domain] = counts.get(domain, 0.0) + count
    return {domain: hits[domain] / counts[domain] for domain in hits if counts[domain]}


def summarize(per_domain: Mapping[str, float]) -> Scores:
    """Return accuracies by domain with their mean and the worst, all in [0, 1]."""
    values = list(per_domain.values())
    return {
        "per_domain": dict(per_domain),
        "mean": sum(values) / len(values) if values else None,
        "worst": min(values) if values else None,
    }


def _has_statistics(plan: NormPlan) -> bool:
    return any(entry.kind in STATISTICS for entry in plan.entries)


def _not_applicable(reason: str) -> Scores:
    return {"not_applicable": reason}
