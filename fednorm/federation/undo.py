"""A client whose training the server did not use goes back to what it kept before: the round never was.

What a client keeps (local tensors, an optimizer's moments, SCAFFOLD's c_i, Ditto's v_k) belongs to the update that it
has sent. The server may reject that for reasons which no client sees: it is longer than ``rounds.max_update_norm``, it
was damaged on its way, it came too late. So a client keeps what it had before its last training, beside what it has
(:func:`remember`), until it hears from the server again; and those whose training was not used are told at the round's
end (``query.undo``, with the round), and go back (:func:`go_back`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fednorm.federation.contexts import BEFORE_RECORD
from fednorm.federation.wire import LazyRecord, MemoryArray, arrays_of, tensor_of
from fednorm.federation.workbench import LOCAL_RECORD, STATE_RECORD, TRAINEE_RECORD

ROUND = "round"
"""Its key for the number of that training's round."""

KEPT = (LOCAL_RECORD, TRAINEE_RECORD, STATE_RECORD)
"""What a client keeps."""


class _Before(Mapping[str, Array]):
    """The arrays of some records as ``RECORD/KEY``, and a round's number: looked up when they are asked for."""

    def __init__(self, server_round: int, records: Mapping[str, ArrayRecord]) -> None:
        self._round, self._records = server_round, records

    def __getitem__(self, path: str) -> Array:
        if path == ROUND:
            return MemoryArray(torch.tensor(self._round))
        name, _, key = path.partition("/")
        return self._records[name][key]

    def __iter__(self) -> Iterator[str]:
        yield ROUND
        yield from (f"{name}/{key}" for name, record in self._records.items() for key in record)

    def __len__(self) -> int:
        return 1 + sum(map(len, self._records.values()))


def kept_now(state: RecordDict) -> dict[str, ArrayRecord]:
    """Return what a client keeps: records that are replaced by training, and never written to."""
    return {name: arrays_of(state, name) for name in KEPT if name in state}


def remember(state: RecordDict, before: Mapping[str, ArrayRecord], server_round: int) -> None:
    """Keep what a client had before a training, if that has changed it.

    Args:
        state: The client's ``Context.state``, after the training.
        before: What :func:`kept_now` returned before it.
        server_round: The training's round.
    """
    forget(state)
    now = kept_now(state)
    if now.keys() == before.keys() and all(now[name] is record for name, record in before.items()):
        return
    state[BEFORE_RECORD] = LazyRecord(_Before(server_round, before))


def forget(state: RecordDict) -> None:
    """Keep the last training for good."""
    if BEFORE_RECORD in state:
        del state[BEFORE_RECORD]


def go_back(state: RecordDict, server_round: int) -> None:
    """Let a client keep what it had before its training in a round; nothing happens if it did not train in it.

    Args:
        state: The client's ``Context.state``.
        server_round: The round.
    """
    if BEFORE_RECORD not in state:
        return
    before = arrays_of(state, BEFORE_RECORD)
    if int(tensor_of(before[ROUND])) != server_round:
        return
    records: dict[str, ArrayRecord] = {}
    for path, array in before.items():
        if path != ROUND:
            name, key = path.split("/", 1)
            records.setdefault(name, ArrayRecord())[key] = array
    for name in KEPT:
        if name in records:
            state[name] = records[name]
        elif name in state:
            del state[name]
    forget(state)
