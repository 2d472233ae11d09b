"""Our in-process runtime: a Flower ``Grid`` whose nodes are clients of this process.

No Ray, no polling, no serialization: what a message asks is handed to an executor of ours, or the message itself to a
ClientApp of anybody's, and the reply handed back. Strategies are the same as on Flower's own runtimes, and so are the
numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fednorm.federation.contexts import FIRST, Contexts
from fednorm.federation.executors import Executor, Failure, Job
from fednorm.federation.flower_private import Run, empty_run, ensure_task_identity
from fednorm.federation.messages import Answered, Asked, asked_of
from fednorm.signals import raise_stop

log = logging.getLogger("fednorm")

CLIENT_FAILED = 1
"""Error code of a reply from a client whose app raised."""


class InProcessGrid(Grid):
    """A grid whose nodes are clients of this process; replies come in the order of the messages.

    A ClientApp is handed Flower's messages, one after the other. An executor is handed what they ask.

    Attributes:
        contexts: Each node's context, by node id; a client's local tensors live in its ``state``.
    """

    def __init__(self, clients: ClientApp | Executor, num_nodes: int, run_config: UserConfig) -> None:
        """Make ``num_nodes`` nodes with partition ids 0 to ``num_nodes - 1``.

        Args:
            clients: An app that handles every message, or an executor that carries out what it asks.
            num_nodes: Number of nodes.
            run_config: Every node's run configuration.
        """
        ensure_task_identity(run_id=1, node_id=1, task_id=1)
        self._app = clients if isinstance(clients, ClientApp) else None
        self._executor = None if isinstance(clients, ClientApp) else clients
        self._run = empty_run(run_id=1)
        self._replies: dict[str, Message] = {}
        self._next_id = 0
        self.contexts: Mapping[int, Context] = Contexts(num_nodes, run_config)

    @property
    def ours(self) -> bool:
        """Whether its clients are fednorm's own, at the server's workbench, and need not be asked who they are."""
        return self._executor is not None

    def set_run(self, run: Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run this grid belongs to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message; Flower's older way, kept for strategies that use it."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def addressed(self, content: RecordDict, message_type: str, node_ids: Iterable[int]) -> list[Message]:
        """Return a message of one content to each of some nodes; Flower's own where an app of anybody's is to read it.

        Args:
            content: What all are sent.
            message_type: What they are asked.
            node_ids: Who is asked.
        """
        if self.ours:
            return [Asked(content, node_id, message_type) for node_id in node_ids]
        return [Message(content, dst_node_id=node_id, message_type=message_type) for node_id in node_ids]

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, in the order of partition ids."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Handle messages at once and keep the replies for :meth:`pull_messages`."""
        ids = []
        for message in messages:
            self._next_id += 1
            ids.append(str(self._next_id))
            self._replies[ids[-1]] = self._handle(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return and forget the replies to pushed messages."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield the reply to each message as it is asked for, so that no update is in memory before it is used."""
        del timeout
        if self._executor is None:
            for message in messages:
                yield self._handle(message)
            return
        messages = list(messages)
        answers = self._executor.run([self._job(message) for message in messages])
        for message, answer in zip(messages, answers, strict=True):
            content = Error(CLIENT_FAILED, answer.reason) if isinstance(answer, Failure) else answer
            yield Answered(content, asked_of(message)[0], message)

    def _job(self, message: Message) -> Job:
        node_id, kind = asked_of(message)
        return Job(kind, node_id - FIRST, message.content, self.contexts[node_id])

    def _handle(self, message: Message) -> Message:
        if self._app is None:
            (reply,) = self.send_and_receive([message])
            return reply
        try:
            return self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # a failing client must not end the round, as on Flower's runtimes
            raise_stop(error)
            log.debug("client of node %d failed", message.metadata.dst_node_id, exc_info=True)
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
