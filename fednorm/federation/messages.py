"""Messages within one process: Flower's, made only for whoever looks at more than what is asked or answered.

A Flower message takes as long to make as a small client's evaluation, for metadata that nobody reads where both ends
are ours: when it was made, how long it lives, whose task it is. An :class:`Asked` and an :class:`Answered` *are*
messages, and have all of that from the moment that somebody asks for it.
"""

from __future__ import annotations

from flwr.app import Error, Message, Metadata, RecordDict


class _Within(Message):
    """A message whose metadata are those of one that Flower makes when they are asked for.

    Attributes:
        node_id: The client's node, whichever way the message goes.
    """

    def __init__(self, body: RecordDict | Error, node_id: int) -> None:
        self.node_id = node_id
        self._body = body
        self._whole: Message | None = None

    def _made(self) -> Message:
        raise NotImplementedError

    @property
    def metadata(self) -> Metadata:
        """Return Flower's metadata."""
        if self._whole is None:
            self._whole = self._made()
        return self._whole.metadata

    @property
    def content(self) -> RecordDict:
        """The content.

        Raises:
            ValueError: There is an error in its place.
        """
        if isinstance(self._body, Error):
            raise ValueError("The message has an error in place of a content.")  # noqa: TRY004 - as Flower's own
        return self._body

    @content.setter
    def content(self, value: RecordDict) -> None:
        self._body = value

    @property
    def error(self) -> Error:
        """The error.

        Raises:
            ValueError: There is none.
        """
        if not isinstance(self._body, Error):
            raise ValueError("The message has a content, and no error.")  # noqa: TRY004 - as Flower's own
        return self._body

    @error.setter
    def error(self, value: Error) -> None:
        self._body = value

    def has_content(self) -> bool:
        """Return whether it has a content."""
        return not isinstance(self._body, Error)

    def has_error(self) -> bool:
        """Return whether it has an error."""
        return isinstance(self._body, Error)


class Asked(_Within):
    """What a client is asked."""

    def __init__(self, content: RecordDict, node_id: int, message_type: str) -> None:
        super().__init__(content, node_id)
        self.message_type = message_type

    def _made(self) -> Message:
        return Message(RecordDict(), dst_node_id=self.node_id, message_type=self.message_type)


class Answered(_Within):
    """What a client answers."""

    def __init__(self, body: RecordDict | Error, node_id: int, asked: Message) -> None:
        super().__init__(body, node_id)
        self._asked = asked

    def _made(self) -> Message:
        return Message(RecordDict(), reply_to=self._asked)


# Flower writes an object's class name into its serialized form and looks it up on the other side.
Asked.__qualname__ = Answered.__qualname__ = Message.__qualname__


def asked_of(message: Message) -> tuple[int, str]:
    """Return which node a message goes to, and what it asks."""
    if isinstance(message, Asked):
        return message.node_id, message.message_type
    metadata = message.metadata
    return metadata.dst_node_id, metadata.message_type


def sender_of(reply: Message) -> int:
    """Return which node a reply comes from."""
    return reply.node_id if isinstance(reply, Answered) else reply.metadata.src_node_id
