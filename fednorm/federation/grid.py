"""Our in-process runtime: a Flower ``Grid`` whose nodes are clients of this process.

No Ray, no polling, no serialization: a message is handed to the ClientApp and its reply handed back. Apps and
strategies are the same as on Flower's own runtimes, and so are the numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fednorm.federation.contexts import Contexts
from fednorm.federation.flower_private import Run, empty_run, ensure_task_identity

log = logging.getLogger("fednorm")

CLIENT_FAILED = 1
"""Error code of a reply from a client whose app raised."""


class InProcessGrid(Grid):
    """A grid whose nodes run one after the other in this process, in the order of the messages.

    Attributes:
        contexts: Each node's context, by node id; a client's local tensors live in its ``state``.
        ours: Whether its clients are fednorm's own, at the server's workbench, and need not be asked who they are.
    """

    ours = False

    def __init__(self, client_app: ClientApp, num_nodes: int, run_config: UserConfig) -> None:
        """Make ``num_nodes`` nodes with partition ids 0 to ``num_nodes - 1``.

        Args:
            client_app: Handles every message.
            num_nodes: Number of nodes.
            run_config: Every node's run configuration.
        """
        ensure_task_identity(run_id=1, node_id=1, task_id=1)
        self._client_app = client_app
        self._run = empty_run(run_id=1)
        self._replies: dict[str, Message] = {}
        self._next_id = 0
        self.contexts: Mapping[int, Context] = Contexts(num_nodes, run_config)

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
        """Yield the reply to each message as it is asked for, so that one client's update is in memory at a time."""
        del timeout
        for message in messages:
            yield self._handle(message)

    def _handle(self, message: Message) -> Message:
        try:
            return self._client_app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # a failing client must not end the round, as on Flower's runtimes
            log.debug("client of node %d failed", message.metadata.dst_node_id, exc_info=True)
            return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
