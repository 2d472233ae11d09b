"""Flower contexts of the clients of this process, made when they are asked for.

What a client keeps between its turns is in its context's ``state``. In a small federation it stays there. In a large
one (more than :data:`SMALL` clients) a client that was never sampled has no context at all, and what the others keep
is in a table on disk (:class:`~fednorm.records.states.States`), from which it comes when a context's state is looked
at: memory has a few clients' at a time.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import islice

from flwr.app import ArrayRecord, Context, RecordDict, UserConfig
from torch import Tensor

from fednorm.federation.wire import nbytes, pack, unpack
from fednorm.records.states import States

LOCAL_RECORD = "fednorm.local"
"""The record of a client's ``Context.state`` that holds its local tensors."""

TRAINEE_RECORD = "fednorm.trainee"
"""The record of a client's ``Context.state`` that holds what its optimizer and effects remember between rounds."""

STATE_RECORD = "fednorm.state"
"""The record of a client's ``Context.state`` that holds what the strategy's client side keeps under its own names."""

PLACES: Mapping[str, str] = {"client": LOCAL_RECORD, "remembered": TRAINEE_RECORD, "state": STATE_RECORD}
"""The records of a client's state that a checkpoint holds, by the first part of their keys."""

_KEPT = frozenset(PLACES.values())

SMALL = 512
"""Clients up to which all of them are held in memory, and written whole with every checkpoint."""

FIRST = 2
"""The node id of client 0."""

LASTING = 2**13
"""Clients up to which a context, once made, lasts: to make one takes as long as a small client's batches."""

BEFORE_RECORD = "fednorm.before"
"""The record of a client's ``Context.state`` that holds what it kept before its last training, as ``RECORD/KEY``."""

AT_ONCE = 64
"""Clients of a large federation whose states are in memory at a time, however large they are."""

HELD = 2**25
"""Bytes of such states up to which more of them are, those that were looked at last."""

_OF_A_TENSOR = 1024
"""Bytes, about, that a tensor takes in memory beside its values."""


class ClientContext(Context):
    """A client's context, whose state is where :class:`Contexts` has it."""

    def __init__(self, contexts: Contexts, node_id: int, num_nodes: int, run_config: UserConfig) -> None:
        self._contexts, self._state = contexts, None
        node_config: UserConfig = {"partition-id": node_id - FIRST, "num-partitions": num_nodes}
        super().__init__(1, node_id, node_config, None, run_config)  # type: ignore[arg-type]

    @property
    def state(self) -> RecordDict:
        """What the client keeps; changes to it are kept."""
        return self._contexts.state_of(self)

    @state.setter
    def state(self, state: RecordDict | None) -> None:
        if state is not None:
            self._contexts.put(self, state)


class Contexts(Mapping[int, Context]):
    """The contexts of all clients by node id, in the order of partition ids.

    Args:
        num_nodes: Number of clients.
        run_config: The run configuration that all of them share.

    Attributes:
        large: Whether what clients keep is in a table.
        table: The table; of a small federation one in which nothing is.
    """

    def __init__(self, num_nodes: int, run_config: UserConfig) -> None:
        self._count, self._run_config = num_nodes, run_config
        self.large = num_nodes > SMALL
        self._round = 0
        self.table = States(None)
        self._made: MutableMapping[int, ClientContext] = {} if num_nodes <= LASTING else weakref.WeakValueDictionary()
        self._held: OrderedDict[int, tuple[ClientContext, RecordDict]] = OrderedDict()
        self._loaded: dict[int, Mapping[str, object]] = {}
        self._most: int | None = None

    def __getitem__(self, node_id: int) -> Context:
        """Return a client's context, the same object as long as anybody has it."""
        if not (isinstance(node_id, int) and FIRST <= node_id < FIRST + self._count):
            raise KeyError(node_id)
        context = self._made.get(node_id)
        if context is None:
            context = self._made[node_id] = ClientContext(self, node_id, self._count, self._run_config)
        return context

    def __iter__(self) -> Iterator[int]:
        return iter(range(FIRST, FIRST + self._count))

    def __len__(self) -> int:
        return self._count

    def attach(self, table: States, ended: int = 0) -> None:
        """Keep what clients keep in a record's table from now on.

        Args:
            table: The table, as it was after ``ended`` rounds.
            ended: How many rounds have ended.
        """
        self.table, self._round = table, ended

    # States ---------------------------------------------------------------------------------------------------------

    def state_of(self, context: ClientContext) -> RecordDict:
        """Return what a client keeps; of a large federation it is fetched, and others' may be put away for it."""
        node_id = context.node_id
        if node_id in self._held:
            self._held.move_to_end(node_id)
            return self._held[node_id][1]
        records = self._fetched(node_id - FIRST)
        state = RecordDict(dict(records))
        self._loaded[node_id] = records
        self._hold(context, state)
        return state

    def put(self, context: ClientContext, state: RecordDict) -> None:
        """Let a client keep something else from now on."""
        self._loaded.setdefault(context.node_id, {"": ArrayRecord()})  # not what was loaded, whatever it is
        self._hold(context, state)

    def _hold(self, context: ClientContext, state: RecordDict) -> None:
        self._held[context.node_id] = context, state
        self._held.move_to_end(context.node_id)
        while self.large and len(self._held) > self._room() and self._put_away(next(iter(self._held))):
            pass

    def _room(self) -> int:
        """Return how many states may be in memory, judged by some of those that are."""
        if len(self._held) <= AT_ONCE:
            return AT_ONCE
        if self._most is None:
            sizes = [_size(state) for _, state in islice(self._held.values(), AT_ONCE)]
            self._most = max(AT_ONCE, HELD // max(*sizes, 1)) if any(sizes) else AT_ONCE
        return self._most

    def _fetched(self, client: int) -> dict[str, ArrayRecord]:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.table.read(client).items():
            place, name = key.split("/", 1)
            parts.setdefault(place, {})[name] = tensor
        return {record: pack(parts[place]) for place, record in PLACES.items() if place in parts}

    def _put_away(self, node_id: int) -> bool:
        """Write a state to the table if it has changed, and forget it; return whether it is forgotten."""
        if not self._write_down(node_id):
            self._held.move_to_end(node_id)
            return False
        del self._held[node_id]
        self._loaded.pop(node_id, None)
        return True

    def _write_down(self, node_id: int) -> bool:
        """Write a state to the table if it has changed; return whether the table holds all of it."""
        _, state = self._held[node_id]
        if state.keys() - _KEPT:
            return False  # a stranger's app keeps what no table holds
        loaded = self._loaded.get(node_id, {})
        if state.keys() != loaded.keys() or any(state[name] is not record for name, record in loaded.items()):
            self.table.write(node_id - FIRST, self._round + 1, flat(state))
            self._loaded[node_id] = dict(state.items())
        return True

    # Rounds -----------------------------------------------------------------------------------------------------------

    def end_round(self, server_round: int) -> None:
        """Write down what the clients of a large federation keep after a round; a checkpoint may follow.

        Raises:
            RecordError: The table cannot be written, or could not during the round.
        """
        self._round, self._most = server_round - 1, None
        for _, state in self._held.values():
            if BEFORE_RECORD in state:  # the round stands
                del state[BEFORE_RECORD]
        if self.table.path is not None:
            for node_id in self._held:
                self._write_down(node_id)
        for node_id in list(self._held)[: max(0, len(self._held) - self._room())]:
            self._put_away(node_id)
        self._round = server_round
        if self.table.path is None and self.table.used:
            self.table.commit(server_round)  # no checkpoint will: what nobody goes back to is dropped


def _size(state: RecordDict) -> int:
    """Return about how many bytes of memory a state takes."""
    return sum(_OF_A_TENSOR * len(record) + nbytes(record.values()) for record in state.array_records.values())


def flat(state: RecordDict) -> dict[str, Tensor]:
    """Return all tensors of a client's state, as ``PLACE/KEY``."""
    return {
        f"{place}/{key}": tensor
        for place, record in PLACES.items()
        if record in state.array_records
        for key, tensor in unpack(state.array_records[record]).items()
    }
