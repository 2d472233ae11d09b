"""A federated run on Flower's own simulation runtime (Ray), from a configuration to its result."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fednorm.config import RunConfig
from fednorm.errors import ConfigError, RecordError
from fednorm.federation.flower_runtime import run_with_flower, write_app
from fednorm.federation.server import Observer, check, read_back
from fednorm.federation.workbench import CLIENTS, Workbench, workbench_of
from fednorm.records.record import RunRecord
from fednorm.signals import Terminated, raising

SERVERAPP = "fednorm.federation.server:app"
CLIENTAPP = "fednorm.federation.client:app"


def simulate_flower(
    config: RunConfig, *, runs: Path, observer: Observer | None = None, timeout: float = 24 * 3600.0
) -> dict[str, Any]:
    """Run a federation with ``flwr run`` on a SuperLink of its own; a finished run is read back.

    The apps are those of the in-process runtime, and so are the numbers. A federation that was cut short goes on from
    the last round: the server has a checkpoint of its own tensors, and each client keeps its own in the record until
    the run has finished. The record is written by the ServerApp.

    Args:
        config: The run's configuration.
        runs: The folder of records.
        observer: Is told how the run goes.
        timeout: Seconds until the run is given up.

    Returns:
        The result, as in ``result.json``.

    Raises:
        FedNormError: The configuration cannot be run or has objects of this process, the run failed, or its record has
            a checkpoint that only the in-process runtime can go on from.
    """
    config.require_importable("Flower's runtime has processes of its own")
    if config.engine != "client":
        raise ConfigError(
            f"engine is {config.engine!r}, and Flower's runtime takes each client for itself. Leave it out, or take "
            "--runtime in-process."
        )
    record = RunRecord(runs, config)
    if finished := read_back(record, config):
        return finished
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"device is {config.device!r}, and Flower's runtime deals GPUs out to its clients itself. Take device "
            "cuda, and say which ones it sees with CUDA_VISIBLE_DEVICES; or the in-process runtime."
        )
    bench = workbench_of(config)
    check(bench)
    with _launching(record):
        if finished := record.result():  # it has finished since
            return finished
        with record.locked():  # not while another process writes to it
            if not ((record.folder / CLIENTS).is_dir() and record.has_checkpoint()):
                record.start_over()
                shutil.rmtree(record.folder / CLIENTS, ignore_errors=True)
        return _launch(record, bench, observer, timeout)


def _launch(record: RunRecord, bench: Workbench, observer: Observer | None, timeout: float) -> dict[str, Any]:
    clients = record.folder / CLIENTS
    clients.mkdir(exist_ok=True)
    run_config = {
        "config": json.dumps(record.config.to_dict()), "runs": str(record.folder.parent), "clients": str(clients)
    }  # fmt: skip
    flower = record.folder / "flower"
    app = write_app(flower / "app", SERVERAPP, CLIENTAPP, run_config)
    if observer:
        observer.begin(bench, len(record.lines()) + 1)
    num_nodes = len(bench.federation.clients)
    try:
        with _following(record, observer):
            run_with_flower(
                app,
                num_supernodes=num_nodes,
                run_config=run_config,
                home=flower / "home",
                client_gpus=float(record.config.device == "cuda"),  # Ray hides what a client does not ask for
                timeout=timeout,
            )
    except (KeyboardInterrupt, Terminated):
        shutil.rmtree(flower, ignore_errors=True)  # nothing has failed: there is no log to read
        raise
    result = record.result()
    if result is None:
        raise RecordError(f"Flower reports the run as completed, but it left no result in {record.folder}.")
    for folder in (flower, clients):
        shutil.rmtree(folder, ignore_errors=True)
    return result


@contextmanager
def _launching(record: RunRecord) -> Iterator[None]:
    """Hold a run for this process from before Flower starts until all of it has ended.

    The record's own lock is the ServerApp's, which is a process of Flower's: between the launcher's look at the record
    and the ServerApp's first word there are seconds, in which a second launcher would have its way too.

    Raises:
        RecordError: Another process has launched this very run.
    """
    who = f"Another process is running this run on Flower's runtime now ({record.folder})."
    with raising(), record.held(".launch", who):
        yield


@contextmanager
def _following(record: RunRecord, observer: Observer | None) -> Iterator[None]:
    """Tell an observer of the rounds that another process appends to a record."""
    if observer is None:
        yield
        return
    ended = threading.Event()
    count = len(record.lines())

    def tell() -> None:
        nonlocal count
        for line in record.lines()[count:]:
            observer.round(line)
            count += 1

    def watch() -> None:
        while not ended.wait(0.5):
            tell()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        tell()
