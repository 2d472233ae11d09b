"""The nodes of a run: which there are, and which client each of them is.

Flower's node ids are random in every run, so clients are told apart by partition id. A node that describes itself
(``query.describe``) says its own. A ClientApp that is not ours has no such query, and its nodes are numbered by the
partition id that the runtime gave them: the in-process grid knows it, and Flower's simulation registers its nodes in
that order. On another runtime the order of registration counts, or, without one, that of the node ids.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fednorm.errors import AggregationError, IncompleteError
from fednorm.federation.constants import differing
from fednorm.federation.contexts import FIRST, Contexts
from fednorm.federation.flower_private import quiet_flower_log
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.replies import About, Cause, Expected, UnfitReply, in_order, read_about

log = logging.getLogger("flwr")

DESCRIBE_SECONDS = 600.0

T = TypeVar("T")

Refusals = list[tuple[int | None, UnfitReply]]


@dataclass(frozen=True, slots=True)
class Node:
    """One client as the server knows it: how to reach it, and what it said of itself.

    Attributes:
        node_id: Flower's number of it.
        partition_id: The client it is.
        domain: The client's domain; empty where nobody knows it.
        held_out: Whether it never trains.
        described: Whether it described itself, as fednorm's clients do.
        trains: Whether it has anything to train on, as far as is known.
        shows: Whether it answers what asks for its local tensors and statistics.
    """

    node_id: int
    partition_id: int
    domain: str = ""
    held_out: bool = False
    described: bool = False
    trains: bool = True
    shows: bool = True


class KnownNodes:
    """The nodes of a run by what they do: of a hundred thousand, nobody goes through all in every round.

    Attributes:
        nodes: All of them.
        by_id: Likewise, by node id.
        seen: Those that are not held out.
        trainers: Those of these that have something to train on, as far as is known.
    """

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.nodes = nodes
        self.by_id = {node.node_id: node for node in nodes}
        self.seen = [node for node in nodes if not node.held_out]
        self.trainers = [node for node in self.seen if node.trains]


def discover(
    grid: Grid, expected: Mapping[int, Expected], constants: Mapping[str, list[float]] | None = None
) -> tuple[tuple[Node, ...], Refusals]:
    """Ask every node of a grid which client it is.

    Args:
        grid: The way to the nodes.
        expected: What the run knows of its clients, by partition id; empty where it knows nothing.
        constants: Prints of the constants of the server's model, by key.

    Returns:
        The nodes in the order of partition ids, and those that could not be taken on, with the reasons.

    Raises:
        IncompleteError: No node could be taken on.
    """
    if isinstance(grid, InProcessGrid) and grid.ours and isinstance(grid.contexts, Contexts) and grid.contexts.large:
        return tuple(_own(partition_id, known) for partition_id, known in expected.items()), []
    ids = numbered(grid)
    refused: Refusals = []
    described: dict[int, About] = {}
    failed: dict[int, UnfitReply] = {}
    unnamed = [Node(node_id, number) for number, node_id in enumerate(ids)]
    ask = addressed(grid, RecordDict(), "query.describe", unnamed)
    with quiet_flower_log(logging.CRITICAL):  # for each app without this query, Flower would log a traceback
        replies = list(grid.send_and_receive(ask, timeout=DESCRIBE_SECONDS))
    for node, reply in in_order(replies, unnamed, range(len(ids)), lambda *refusal: refused.append(refusal)):
        try:
            if about := read_about(reply):
                described[node.node_id] = about
        except UnfitReply as unfit:
            failed[node.node_id] = unfit
    if not described and all(unfit.cause is not Cause.OTHER for unfit in failed.values()):
        text = "fednorm: the ClientApp does not describe itself (query.describe); its %d nodes are numbered from 0"
        log.info(text, len(ids))
        nodes = [_foreign(node, expected) for node in unnamed]
    else:
        unlike = {node_id: differing(constants or {}, about.constants or {}) for node_id, about in described.items()
                  if about.constants is not None}  # fmt: skip
        nodes = _described(ids, described, failed, expected, refused, unlike)
    refused += [(node.partition_id, _too_many(node, expected)) for node in nodes if not _fits(node, expected)]
    taken = sorted((node for node in nodes if _fits(node, expected)), key=lambda node: node.partition_id)
    if ids and not taken:
        reasons = "; ".join(dict.fromkeys(unfit.reason for _, unfit in refused))
        raise IncompleteError(f"None of the {len(ids)} nodes can be taken on as a client: {reasons}.")
    return tuple(taken), refused


def _own(partition_id: int, known: Expected) -> Node:
    """Return a client of this very process, of which there is nothing to ask."""
    return Node(partition_id + FIRST, partition_id, known.domain, known.held_out, True, known.train > 0)


def asked(
    grid: Grid,
    content: RecordDict,
    message_type: str,
    nodes: Sequence[Node],
    read: Callable[[Node, Message], T],
    reject: Callable[[int | None, UnfitReply], None],
) -> Iterator[tuple[Node, T]]:
    """Yield what each node answers, in the order of partition ids, without those whose answers do not fit.

    Args:
        grid: The way to the nodes.
        content: What all are sent.
        message_type: What they are asked.
        nodes: Who is asked.
        read: Returns what a reply holds, or raises :class:`~fednorm.federation.replies.UnfitReply`.
        reject: Is told of replies that do not fit, with the client's partition id, or None where no client sent it.
    """
    messages = addressed(grid, content, message_type, nodes)
    awaited = sorted(node.partition_id for node in nodes)
    for node, reply in in_order(grid.send_and_receive(messages) if messages else (), nodes, awaited, reject):
        try:
            yield node, read(node, reply)
        except UnfitReply as unfit:
            reject(node.partition_id, unfit)


def addressed(grid: Grid | None, content: RecordDict, message_type: str, nodes: Sequence[Node]) -> list[Message]:
    """Return a message of one content to each of some nodes.

    Args:
        grid: The way to them.
        content: What all are sent.
        message_type: What they are asked.
        nodes: Who is asked.
    """
    if isinstance(grid, InProcessGrid):
        return grid.addressed(content, message_type, [node.node_id for node in nodes])
    return [Message(content, dst_node_id=node.node_id, message_type=message_type) for node in nodes]


def wait_for_nodes(grid: Grid, count: int, seconds: float) -> None:
    """Wait until as many nodes have come as a run has clients.

    Args:
        grid: Where they come to.
        count: How many.
        seconds: How long to wait for them.

    Raises:
        AggregationError: Fewer have come.
    """
    waited_until = time.monotonic() + seconds
    while (there := len(list(grid.get_node_ids()))) < count:
        if time.monotonic() > waited_until:
            raise AggregationError(
                f"The run has {count} clients, and {there} nodes came within {seconds:.0f} s. "
                f"With flwr run: --federation-config 'num-supernodes={count}'."
            )
        time.sleep(0.2)


def numbered(grid: Grid) -> list[int]:
    """Return a grid's node ids in an order that is the same in every run, where the runtime gives one away."""
    if isinstance(grid, InProcessGrid):
        return list(grid.get_node_ids())  # in the order of partition ids
    nodes = list(grid.get_nodes())
    return [node.node_id for node in sorted(nodes, key=lambda node: (node.registered_at, node.node_id))]


def _foreign(node: Node, expected: Mapping[int, Expected]) -> Node:
    """Return a node that described nothing, with what the run knows of the client of its number."""
    known = expected.get(node.partition_id)
    return (
        Node(node.node_id, node.partition_id, known.domain, known.held_out, trains=known.train > 0) if known else node
    )


def _described(
    ids: list[int],
    described: Mapping[int, About],
    failed: Mapping[int, UnfitReply],
    expected: Mapping[int, Expected],
    refused: Refusals,
    unlike: Mapping[int, str],
) -> list[Node]:
    """Return the nodes that said who they are; the others are refused, as nobody knows whose data they have."""
    claims = Counter(about.partition_id for about in described.values())
    nodes = []
    for node_id in ids:
        about = described.get(node_id)
        if about is None:
            refused.append((None, failed.get(node_id) or UnfitReply("it did not describe itself, as others did")))
        elif claims[about.partition_id] > 1:
            number = about.partition_id
            refused.append((number, UnfitReply(f"{claims[number]} nodes say that they are client {number}")))
        elif key := unlike.get(node_id):
            refused.append((about.partition_id, _other_constant(key)))
        elif unfit := _contradiction(about, expected):
            refused.append((about.partition_id, unfit))
        else:
            nodes.append(
                Node(node_id, about.partition_id, about.domain, about.held_out, described=True, trains=about.train != 0)
            )
    return nodes


def _contradiction(about: About, expected: Mapping[int, Expected]) -> UnfitReply | None:
    known = expected.get(about.partition_id)
    if known is None or (about.domain, about.held_out) == (known.domain, known.held_out):
        return None
    claim, own = (f"{domain!r}{', held out' * out}" for domain, out in (
        (about.domain, about.held_out), (known.domain, known.held_out)
    ))  # fmt: skip
    return UnfitReply(f"it says that its domain is {claim}; this run's client {about.partition_id} has {own}")


def _other_constant(key: str) -> UnfitReply:
    return UnfitReply(
        f"the constant {key} of its model is not the server's. Constants are never sent: build both models alike, seed "
        "and versions included, or declare the tensor a 'weight' (fednorm.declare_tensors)"
    )


def _fits(node: Node, expected: Mapping[int, Expected]) -> bool:
    return not expected or node.partition_id in expected


def _too_many(node: Node, expected: Mapping[int, Expected]) -> UnfitReply:
    return UnfitReply(f"this run has the clients 0 to {max(expected)}, and no client {node.partition_id}")
