"""What a federation needs to go on: the server's tensors, the strategy's own, and what every client keeps.

In a checkpoint they stand under ``server/KEY``, ``strategy/KEY``, and for each client ``PLACE/PARTITION_ID/KEY``: its
local tensors as ``client``, what its optimizer and effects remember as ``remembered``, and what its side of the
strategy keeps under names of its own as ``state``.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from torch import Tensor

from fednorm.device import on_cpu
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.local import Local
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import LOCAL_RECORD, STATE_RECORD, TRAINEE_RECORD, Workbench
from fednorm.records.checkpoint import Checkpoint

PLACES: Mapping[str, str] = {"client": LOCAL_RECORD, "remembered": TRAINEE_RECORD, "state": STATE_RECORD}
"""The records of a client's state that a checkpoint holds, by the first part of their keys."""


def taken(server_round: int, arrays: ArrayRecord, bench: Workbench, grid: Grid, data: str) -> Checkpoint:
    """Return the checkpoint of a federation: of its server, and of its clients where they live in this process.

    Args:
        server_round: The round that has ended.
        arrays: The server's tensors after it.
        bench: The run's workbench.
        grid: Where its clients live.
        data: The digest of the data.
    """
    tensors = {f"server/{key}": tensor for key, tensor in unpack(arrays).items()}
    tensors |= {f"strategy/{key}": tensor for key, tensor in bench.strategy.state_dict().items()}
    for place, record in PLACES.items():
        for partition_id, own in kept(grid, record).items():
            tensors |= {f"{place}/{partition_id}/{key}": tensor for key, tensor in own.items()}
    return Checkpoint(server_round, tensors, data=data)


def restored(checkpoint: Checkpoint, bench: Workbench, grid: Grid) -> ArrayRecord:
    """Give everyone what a checkpoint has of them, and return the server's tensors.

    Raises:
        KeyError: The checkpoint lacks an entry.
        ConfigError: The strategy's own tensors do not fit it.
    """
    parts: dict[str, dict[str, Tensor]] = {"server": {}, "strategy": {}}
    for key, tensor in checkpoint.tensors.items():
        place, name = key.split("/", 1)
        if place in PLACES:
            partition_id, name = name.split("/", 1)
            place = f"{place}/{partition_id}"
        parts.setdefault(place, {})[name] = tensor
    bench.strategy.load_state_dict(parts["strategy"])
    for context in grid.contexts.values() if isinstance(grid, InProcessGrid) else ():
        for place, record in PLACES.items():
            if own := parts.get(f"{place}/{context.node_config['partition-id']}"):
                context.state[record] = pack(own)
    return pack(parts["server"])


def personal(bench: Workbench, grid: Grid, arrays: ArrayRecord, server_round: int) -> dict[int, dict[str, Tensor]]:
    """Return what each client's own network has in place of what the server sent, where its strategy makes it another.

    That is what the client is evaluated with: Ditto's own model, a fine-tuned one. Empty for other strategies, and
    where the clients do not live in this process.

    Args:
        bench: The run's workbench.
        grid: Where the clients live.
        arrays: The server's tensors at the end.
        server_round: The last round.
    """
    side = bench.strategy.local
    if side.before_evaluation is Local.before_evaluation or not isinstance(grid, InProcessGrid):
        return {}
    models = {}
    for context in grid.contexts.values():
        client = bench.client(context)
        if client.held_out:
            continue
        bench.receive(arrays, context.state)
        turn = bench.turn(client, server_round, context=context, evaluating=True)
        side(bench.strategy).before_evaluation(turn)
        models[client.partition_id] = on_cpu(turn.read())
    return models


def kept(grid: Grid, record: str) -> dict[int, dict[str, Tensor]]:
    """Return what each client keeps in a record of its state, where the clients live in this process.

    Args:
        grid: Where the clients live.
        record: The record's name.
    """
    contexts = grid.contexts.values() if isinstance(grid, InProcessGrid) else ()
    return {
        int(context.node_config["partition-id"]): unpack(context.state.array_records[record])
        for context in contexts
        if record in context.state.array_records
    }
