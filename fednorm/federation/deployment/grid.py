"""The way to nodes that may be slow, die, or come back: every message is answered, by its node or in its place.

A SuperLink answers for a node that it has lost, with an error whose source is itself; a node that is slow is not
answered for at all. Here each message of a call is answered exactly once, under the name of the node that it went to:
by the node's reply, by the SuperLink's error, or, when time is up, by an error of our own. A reply that comes later is
fetched, dropped and counted (:attr:`DeployedGrid.late`), so that no later round takes it for its own. Where a node has
let its time go by, it is told that its training was not used (``query.undo``), and nobody waits for it to say that it
has heard: a silent node holds up a round by ``rounds.timeout``, and by no more. What else it is asked in that round, it
is sent, and waited for no longer than the others, until it answers anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fednorm.federation.deployment.kept import SITE
from fednorm.federation.flower_private import Run

NO_ANSWER = 2
"""Error code of a reply that stands in for one that did not come."""

POLL_SECONDS = 0.2
"""Between two looks for replies."""

UNDO = "query.undo"
"""What a node whose training was not used is told."""

SPENT = "it let the round's time go by before, and was not waited for any more than the others"
"""Why there is no reply of a node that was silent already in a round."""

DESCRIBE = "query.describe"
"""What a node is asked before it is known; its caller says how long to wait for that."""


class AddressedGrid(Grid):
    """A grid over another, of Flower's own, that says to each client beside every message what the server knows of it.

    Args:
        grid: The other.

    Attributes:
        addressed: What goes to a node beside every message (:data:`SITE`), by node id; nothing to one that is unknown.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.addressed: Callable[[int], Mapping[str, str | int] | None] = lambda _: None

    def set_run(self, run: Run) -> None:
        """Set the run this grid belongs to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Return the run this grid belongs to."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message; Flower's older way, kept for strategies that use it."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are there now."""
        return list(self._grid.get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, as the other grid does."""
        return self._grid.push_messages(map(self._address, messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch replies, as the other grid does."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies, as the other grid does."""
        return self._grid.send_and_receive(map(self._address, messages), timeout=timeout)

    def _address(self, message: Message) -> Message:
        said = self.addressed(_node(message))
        if said is not None:  # the content may be other nodes' too
            message.content = RecordDict({**message.content, SITE: ConfigRecord(dict(said))})
        return message


class DeployedGrid(AddressedGrid):
    """A grid over another, of Flower's own, for nodes that fail.

    Args:
        grid: The other.
        timeout: Seconds to wait for answers where a caller names no time of its own, and at most where it does.

    Attributes:
        late: Node ids of the replies that came after their time, in the order in which they came.
    """

    def __init__(self, grid: Grid, *, timeout: float) -> None:
        super().__init__(grid)
        self._timeout = timeout
        self._overdue: dict[str, int] = {}
        self._unawaited: set[str] = set()
        self._silent: set[int] = set()
        self.late: list[int] = []

    def begin_round(self) -> None:
        """Have patience again with those that let their time go by in the round before."""
        self._silent.clear()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages, and yield one reply to each as it comes; errors stand in for those that do not come in time.

        A message to a node that is not there is not sent. One that says to a silent node that its training was not used
        is sent, and not waited for. Neither is any other to a node that has let its time go by in this round, once all
        others have answered.
        """
        seconds = min(self._timeout, timeout or self._timeout)
        until = time.monotonic() + seconds
        there, overdue = set(self._grid.get_node_ids()), set(self._overdue.values())
        awaited: dict[str, Message] = {}
        for message in messages:
            self._address(message)
            number = next(iter(self._grid.push_messages([message])), None) if _node(message) in there else None
            if number is None:
                yield _stand_in(message, "the node is not there")
            elif message.metadata.message_type == UNDO and _node(message) in overdue:
                self._unawaited.add(number)
                yield _stand_in(message, "it is silent, and was told without waiting for its answer")
            else:
                awaited[number] = message
        while awaited:
            yield from self._come(awaited)
            if time.monotonic() >= until or all(map(self._is_silent, awaited.values())):
                break
            time.sleep(POLL_SECONDS)
        yield from self._given_up(
            awaited, f"no reply came within {seconds:g} s (rounds.timeout is {self._timeout:g} s)"
        )

    def _given_up(self, awaited: Mapping[str, Message], reason: str) -> Iterator[Message]:
        spent = [number for number, message in awaited.items() if self._is_silent(message)]
        for number, message in awaited.items():
            self._overdue[number] = _node(message)
            if message.metadata.message_type != DESCRIBE:
                self._silent.add(_node(message))
            yield _stand_in(message, SPENT if number in spent else reason)

    def _is_silent(self, message: Message) -> bool:
        return _node(message) in self._silent and message.metadata.message_type != DESCRIBE

    def _come(self, awaited: dict[str, Message]) -> Iterator[Message]:
        """Yield what has come of the awaited replies, and take it off them; what is overdue is counted and dropped."""
        for reply in self._grid.pull_messages([*awaited, *self._overdue, *self._unawaited]):
            number = reply.metadata.reply_to_message_id
            self._unawaited.discard(number)
            self._silent.discard(reply.metadata.src_node_id)
            if (node := self._overdue.pop(number, None)) is not None:
                if reply.has_content():  # else the SuperLink answers for a node that is gone
                    self.late.append(node)
            elif (message := awaited.pop(number, None)) is not None:
                if reply.has_error() and reply.metadata.src_node_id != _node(message):
                    reply = _stand_in(message, reply.error.reason or f"error code {reply.error.code}")
                yield reply


def _node(message: Message) -> int:
    return int(message.metadata.dst_node_id)


def _stand_in(message: Message, reason: str) -> Message:
    return Message(Error(NO_ANSWER, reason), reply_to=message)
