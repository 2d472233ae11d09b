"""What a federation needs to go on: the server's tensors, the strategy's own, and what every client keeps.

In a checkpoint they stand under ``server/KEY``, ``strategy/KEY``, and for each client ``PLACE/PARTITION_ID/KEY``: its
local tensors as ``client``, what its optimizer and effects remember as ``remembered``, and what its side of the
strategy keeps under names of its own as ``state``. Clients of a large federation have a row each in a table beside it
(:mod:`fednorm.records.states`), under the same names without their partition id.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid
from torch import Tensor

from fednorm.device import on_cpu
from fednorm.federation.contexts import FIRST, PLACES, Contexts
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.local import Local
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import Workbench
from fednorm.records.checkpoint import Checkpoint


def in_table(grid: Grid) -> Contexts | None:
    """Return the contexts of a large federation of this process, whose clients' states are in a table; else None."""
    contexts = grid.contexts if isinstance(grid, InProcessGrid) else None
    return contexts if isinstance(contexts, Contexts) and contexts.large else None


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
    if large := in_table(grid):
        return Checkpoint(server_round, tensors, data=data, table=large.table.used)
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
    of_clients = parts.keys() - {"server", "strategy"}
    for context in grid.contexts.values() if of_clients and isinstance(grid, InProcessGrid) else ():
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
    if not _makes_another(bench) or not isinstance(grid, InProcessGrid):
        return {}
    return {
        int(context.node_config["partition-id"]): _own_model(bench, context, arrays, server_round)
        for context in grid.contexts.values()
        if not bench.client(context).held_out
    }


def finished_table(
    bench: Workbench, contexts: Contexts, arrays: ArrayRecord, server_round: int, evaluated: Iterable[int]
) -> bool:
    """Write what :func:`personal` returns to the table of a large federation, one client in memory at a time.

    Args:
        bench: The run's workbench.
        contexts: The clients.
        arrays: The server's tensors at the end.
        server_round: The last round.
        evaluated: The partition ids of the clients that the last round has evaluated: no others have a row for it.

    Returns:
        Whether there is anything in the table.
    """
    table = contexts.table
    if _makes_another(bench):
        for partition_id in evaluated:
            own = _own_model(bench, contexts[partition_id + FIRST], arrays, server_round)
            # After the last round: rows of its checkpoint stay what they are, should the run be killed before its end.
            named = {f"personal/{key}": tensor for key, tensor in own.items()}
            table.write(partition_id, server_round + 1, {**table.read(partition_id), **named})
        table.commit(server_round + 1)
    return table.used


def _makes_another(bench: Workbench) -> bool:
    return bench.strategy.local.before_evaluation is not Local.before_evaluation


def _own_model(bench: Workbench, context: Context, arrays: ArrayRecord, server_round: int) -> dict[str, Tensor]:
    """Return the model that a client is evaluated with."""
    bench.receive(arrays, context.state)
    turn = bench.turn(bench.client(context), server_round, context=context, evaluating=True)
    bench.strategy.local(bench.strategy).before_evaluation(turn)
    return on_cpu(turn.read())


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
