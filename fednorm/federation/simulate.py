"""A federated run in this process, from a configuration to its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fednorm.allocation import large_blocks_kept
from fednorm.config import RunConfig
from fednorm.federation.executors import Executor
from fednorm.federation.executors.choice import executor_of, workers_of
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.server import Observer, check, describe, make_server_app, read_back
from fednorm.federation.workbench import Workbench, workbench_of
from fednorm.records.record import RunRecord
from fednorm.threads import lasting_objects, torch_threads


def plan(config: RunConfig, bench: Workbench | None = None) -> dict[str, Any]:
    """Return what is known of a run before training, and refuse what cannot be run.

    Raises:
        FedNormError: The configuration cannot be run.
    """
    bench = bench or workbench_of(config)
    check(bench)
    workers = workers_of(bench)
    return {"kind": config.kind, **describe(bench), "workers": workers, "hash": config.hash, "config": config.to_dict()}


def simulate(
    config: RunConfig,
    *,
    runs: Path | None,
    observer: Observer | None = None,
    bench: Workbench | None = None,
    executor: Callable[[Workbench], Executor] = executor_of,
) -> dict[str, Any]:
    """Run a federation on the in-process grid; a run that was cut short goes on, a finished one is read back.

    Args:
        config: The run's configuration.
        runs: The folder of records, or None to write nothing.
        observer: Is told how the run goes.
        bench: The run's workbench, if it was made already.
        executor: Makes what carries out the clients' turns: by default what the configuration asks for, or what pays.

    Returns:
        The result, as in ``result.json``.

    Raises:
        FedNormError: The configuration cannot be run, too few clients answered, or the record cannot be written.
    """
    record = RunRecord(runs, config) if runs else None
    if record and (finished := read_back(record, config)):
        return finished
    made = bench or workbench_of(config)
    results: list[dict[str, Any]] = []
    server_app = make_server_app(lambda _: made, lambda *_: record, observer, results.append)
    run_config = {"config": json.dumps(config.to_dict())}
    carrying = executor(made)
    grid = InProcessGrid(carrying, len(made.federation.clients), dict(run_config))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
    with large_blocks_kept(), torch_threads(config.threads), closing(carrying), lasting_objects():
        server_app(grid, context)
    return results[0]
