"""``fednorm bench scale``: what a round costs where many clients stand by and a hundred are sampled.

FedBN, whose clients keep tensors of their own, on the tiny network and images of ``bench engine``'s tiny case, with a
record on the disk and a checkpoint a round; those who were sampled are evaluated in each. All clients hold rows of one
pool of images, so that the table says what clients cost, and not what their images would. Every number of clients is
run in a process of its own, which starts with nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fednorm.bench.meter import ProcessWatch, RoundClock, cost
from fednorm.config import RunConfig, resolve
from fednorm.cores import available_cores
from fednorm.data.clients import Clients, Group, Share
from fednorm.data.domain import Federation, Split
from fednorm.errors import ConfigError
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.records.versions import versions
from fednorm.report.table import Table
from fednorm.rng import stream
from fednorm.threads import torch_threads

CLIENTS = (10, 1_000, 10_000, 100_000)
"""The numbers of clients that are measured by default."""

MOST = 10_000_000
"""Clients beyond which the arrays of who holds what are too much for a table of this kind."""

SAMPLED, ROUNDS, TRAIN, TEST, POOL, SIZE = 100, 5, 8, 4, 4096, 8
"""Clients a round, timed rounds, images of a client, images of all, pixels a side."""


def federation(clients: int, seed: int = 0) -> Federation:
    """Return clients that hold rows of one pool of images.

    Args:
        clients: How many.
        seed: Of the images, and of who holds which.
    """
    rng = stream(seed, "bench", "scale")
    images = torch.from_numpy(rng.integers(0, 256, (POOL, 3, SIZE, SIZE), dtype="uint8"))
    labels = torch.from_numpy(rng.integers(0, 10, POOL))

    def share(each: int) -> Share:
        rows = torch.from_numpy(rng.integers(0, POOL, clients * each))
        return Share(Split(images, labels, rows), np.arange(1, clients + 1, dtype=np.int64) * each)

    return Federation("synthetic images", 10, SIZE, Clients((Group("synthetic", share(TRAIN), share(0), share(TEST)),)))


def config_of(clients: int, rounds: int = ROUNDS) -> RunConfig:
    """Return the configuration of a run in which a hundred of some clients are sampled a round.

    Args:
        clients: How many there are.
        rounds: Rounds after the first.
    """
    return resolve(
        {
            "workers": 1,  # whose processor time is all of this process
            "model": {"name": "digits_cnn", "width": 4},
            "strategy": {"name": "fedbn"},
            "train": {"batch_size": TRAIN},
            "rounds": {"num_rounds": rounds + 1, "fraction": min(1.0, SAMPLED / clients)},
            "evaluate": {"clients": "sampled", "diagnostics": False},
        }
    )


def measured(clients: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run one number of clients in this process, and return what it cost.

    Args:
        clients: How many there are.
        rounds: Timed rounds.

    Returns:
        A row of :func:`bench_scale`.
    """
    config = config_of(clients, rounds)
    with tempfile.TemporaryDirectory(prefix="fednorm-bench-") as folder, torch_threads(1):
        with ProcessWatch(descendants=False) as watch:
            clock = RoundClock()
            simulate(config, runs=Path(folder), observer=clock, bench=Workbench(config, federation(clients)))
        spent = cost(clock.wall, clock.cpu, watch.memory, {})
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "clients": clients,
        "sampled": min(SAMPLED, clients),
        "wall_seconds": median(spent.wall),
        "cpu_seconds": median(spent.cpu),
        "startup_wall_seconds": spent.startup_wall,
        "startup_cpu_seconds": spent.startup_cpu,
        "memory_mb": spent.memory / 1e6,
        "disk_mb": size / 1e6,
    }


def bench_scale(
    clients: Sequence[int] = CLIENTS, rounds: int = ROUNDS, on_line: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure rounds of a hundred clients among more and more of them.

    Args:
        clients: How many there are.
        rounds: Timed rounds of each.
        on_line: Is told what has been measured, a line at a time.

    Returns:
        A document for JSON: ``machine``, ``rounds``, and for each number of clients a row of ``scale``: the median
        ``wall_seconds`` and ``cpu_seconds`` of a round, checkpoint included; ``startup_wall_seconds`` and
        ``startup_cpu_seconds`` to the end of the first round; ``memory_mb``, the most private memory; ``disk_mb`` of
        the record.

    Raises:
        ConfigError: A number is out of range.
    """
    for name, values, most in (("clients", clients, MOST), ("rounds", [rounds], 1000)):
        if not values or not all(1 <= value <= most for value in values):
            raise ConfigError(
                f"{name} of bench scale must be between 1 and {most:,}; got {', '.join(map(str, values))}."
            )
    rows = []
    for count in clients:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            row = pool.submit(measured, count, rounds).result()
        rows.append(row)
        if on_line:
            on_line(
                f"{count:,} clients: {row['wall_seconds']:.3f} s a round, {row['memory_mb']:.0f} MB, "
                f"{row['disk_mb']:.1f} MB on the disk"
            )
    machine = {
        "cores": available_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }
    return {"kind": "bench scale", "machine": machine, "rounds": rounds, "scale": rows}


def scale_table(result: dict[str, Any]) -> Table:
    """Return the table of what :func:`bench_scale` has measured."""
    machine, found = result["machine"], result["machine"]["versions"]
    columns = (
        "clients",
        "sampled",
        "wall s a round",
        "CPU s a round",
        "start s",
        "start CPU s",
        "memory MB",
        "disk MB",
    )
    rows = tuple(
        (
            f"{row['clients']:,}",
            str(row["sampled"]),
            f"{row['wall_seconds']:.3f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['startup_wall_seconds']:.1f}",
            f"{row['startup_cpu_seconds']:.1f}",
            f"{row['memory_mb']:.0f}",
            f"{row['disk_mb']:.1f}",
        )
        for row in result["scale"]
    )
    notes = (
        f"FedBN, digits_cnn of width 4, {SIZE}×{SIZE}; {TRAIN} training images (1 step of {TRAIN}) and {TEST} test "
        "images a client, rows of one pool; those sampled are evaluated; with a record and a checkpoint every round.",
        f"Median of {result['rounds']} rounds; start: from the data in memory to the first round's end; memory: the "
        "most private memory of the process; disk: of the record at the end.",
        f"{machine['cores']} cores ({machine['cpu_capability']}), 1 PyTorch thread, load average "
        f"{machine['load_average']}; torch {found['torch']}, flwr {found['flwr']}, Python {found['python']}.",
    )
    return Table("Scale", columns, rows, notes)
