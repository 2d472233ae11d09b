"""``fednorm bench engine``: what a federated run costs here, beside a bare PyTorch loop and Flower's own runtime.

Every engine runs the same case to the same weights, which is checked. All of them run a first round to warm up, which
counts as start; the rounds after it are timed. Engines take turns within each repetition, each in a process of its own,
so that a slow minute of the machine meets all of them, and the fastest round of each counts: whatever else runs on a
machine only adds time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fednorm.bench.alone import alone
from fednorm.bench.bare import federated_averaging
from fednorm.bench.case import Case, case_of
from fednorm.bench.flower_apps import STAMPS
from fednorm.bench.meter import Cost, ProcessWatch, RoundClock, cost
from fednorm.bench.peers import PEERS, blazefl, fluke, pfl, require_peer, setting_of
from fednorm.cards import STRATEGIES
from fednorm.config import choose
from fednorm.cores import available_cores, usable_cores
from fednorm.errors import ConfigError
from fednorm.federation.cohort.work import work_of
from fednorm.federation.executors import Answer, Executor, Job
from fednorm.federation.executors.cohort import Cohort
from fednorm.federation.executors.sequential import Sequential
from fednorm.federation.executors.workers import Workers
from fednorm.federation.flower_runtime import require_simulation, run_with_flower, write_app
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import arrays_of, unpack
from fednorm.federation.workbench import Workbench
from fednorm.records.versions import versions
from fednorm.report.table import Table
from fednorm.threads import torch_threads

THREADS = 1
"""PyTorch threads of every engine's every process."""

_FLOWER_TIMEOUT = 3600.0


def run_bare(case: Case, *, channels_last: bool = True) -> Cost:
    """Run a case in the bare loop.

    Args:
        case: The case.
        channels_last: Lay images and weights out as the engine does; else as PyTorch does by default.
    """
    setting = setting_of(case, torch.channels_last if channels_last else torch.contiguous_format)
    with torch_threads(THREADS), ProcessWatch(descendants=False) as watch:
        clock = RoundClock()
        tensors = federated_averaging(
            setting.model,
            setting.clients,
            rounds=case.rounds + 1,
            batch_size=case.batch_size,
            learning_rate=setting.learning_rate,
            seed=case.seed,
            on_round=clock.tick,
        )
    return cost(clock.wall, clock.cpu, watch.memory, tensors)


def run_fednorm(case: Case) -> Cost:
    """Run a case on the in-process grid, one client after the other, without a record."""
    return _run_here(case, Sequential, workers=False)


def run_workers(case: Case) -> Cost:
    """Run a case on the in-process grid with a worker for each core, two at least, and count all processes."""
    return _run_here(case, partial(Workers, count=max(2, usable_cores())), workers=True)


def run_cohort(case: Case) -> Cost:
    """Run a case on the in-process grid by cohorts, of as many clients as the model's size suggests."""

    def make(bench: Workbench) -> Executor:
        return Cohort(bench, work_of(bench, min(case.batch_size, case.train)).clients)

    return _run_here(case, make, workers=False)


def _run_here(case: Case, make: Callable[[Workbench], Executor], *, workers: bool) -> Cost:
    bench = case.workbench()
    executor = _Watched(make(bench))
    with torch_threads(THREADS), ProcessWatch(descendants=workers, itself=True) as watch:
        clock = RoundClock(workers=workers)
        simulate(bench.config, runs=None, observer=clock, bench=bench, executor=lambda _: executor)
    return cost(clock.wall, clock.cpu, watch.memory, executor.sent)


class _Watched:
    """Keeps what clients were sent last: a run ends by evaluating the server's tensors."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.sent: dict[str, Tensor] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        if jobs and "arrays" in jobs[-1].content:
            self.sent = unpack(arrays_of(jobs[-1].content, "arrays"))
        return self._executor.run(jobs)

    def close(self) -> None:
        self._executor.close()


def run_flower(case: Case) -> Cost:
    """Run a case on Flower's simulation runtime, one client a core at a time, and measure all its processes together.

    Raises:
        ConfigError: The simulation extra is not installed.
        AggregationError: The run failed.
    """
    with tempfile.TemporaryDirectory(prefix="fednorm-bench-") as folder:
        home, runs = Path(folder, "home"), Path(folder, "runs")
        config = {"case": case.to_json(), "runs": str(runs)}
        apps = "fednorm.bench.flower_apps"
        app = write_app(Path(folder, "app"), f"{apps}:server", f"{apps}:client", config)
        with ProcessWatch(descendants=True) as watch:
            run_with_flower(app, num_supernodes=case.clients, run_config=config, home=home, timeout=_FLOWER_TIMEOUT)
        ends = [float(line) for line in (runs / STAMPS).read_text(encoding="utf-8").split()]
        tensors = load_file(next(runs.glob("*/model.safetensors")))
    times = [watch.started, *ends]
    return cost(times, watch.cpu_at(times), watch.memory, tensors)


def run_peer(case: Case, *, run: Callable[[Case], Cost]) -> Cost:
    """Run a case in another simulator, in this process.

    Args:
        case: The case.
        run: Runs it there.

    Raises:
        ConfigError: It is not installed.
    """
    with torch_threads(THREADS):
        return run(case)


ENGINES: Mapping[str, Callable[[Case], Cost]] = {
    "bare": run_bare,
    "bare-contiguous": partial(run_bare, channels_last=False),
    "fednorm": run_fednorm,
    "workers": run_workers,
    "cohort": run_cohort,
    "flower": run_flower,
    "fluke": partial(run_peer, run=fluke.run),
    "blazefl": partial(run_peer, run=blazefl.run),
    "pfl": partial(run_peer, run=pfl.run),
}
"""How each engine runs a case. ``bare-contiguous`` is the bare loop in PyTorch's default memory layout."""

PLAIN = ("bare", "bare-contiguous", *PEERS)
"""Engines that are given cases of federated averaging alone: the bare loops, and the other simulators."""

ANYWHERE = ("bare", "bare-contiguous", "fednorm", "cohort")
"""Engines that compute on any device; the others compute on the CPU here."""


def bench_engine(
    cases: Sequence[str],
    against: Sequence[str],
    repeats: int,
    on_line: Callable[[str], None] | None = None,
    *,
    strategy: str = "",
    device: str = "cpu",
) -> dict[str, Any]:
    """Time fednorm's engine beside others.

    Args:
        cases: Names of :data:`~fednorm.bench.case.CASES`.
        against: Names of :data:`ENGINES`; ``fednorm`` is always run.
        repeats: How often each engine runs each case.
        on_line: Is told what has been measured, a line at a time.
        strategy: That of every case, with the norm that it brings along; each case's own if empty.
        device: Where clients train and are evaluated, ``cuda`` for example; of :data:`ANYWHERE` alone if not ``cpu``.

    Returns:
        A document for JSON: ``machine``, and for each of ``cases`` its ``engines`` with, each a round: ``cpu_seconds``
        and ``wall_seconds`` (the fastest, and ``all_cpu_seconds`` as they came), ``ratio`` of processor time and
        ``wall_ratio`` of wall-clock time to the bare loop's, and ``overhead_ms`` a client over it (None without
        ``bare``); ``startup_cpu_seconds`` and ``startup_wall_seconds`` to the end of the first round; ``memory_mb``;
        and ``difference``, the largest of a final weight to fednorm's.

    Raises:
        ConfigError: An engine is unknown or not installed, or not for the device; there is no such device; or
            ``repeats`` is less than 1.
        UnknownNameError: There is no such case, or no such strategy.
        AggregationError: Flower's run failed.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1; got {repeats}.")
    for name in against:
        choose("against", name, ENGINES)
    engines = [name for name in ENGINES if name in {*against, "fednorm"}]
    if device != "cpu" and (here := [name for name in engines if name not in ANYWHERE]):
        raise ConfigError(
            f"{', '.join(here)} would compute on the CPU, beside others on {device}. Leave them out of --against; "
            f"{', '.join(ANYWHERE)} compute on any device."
        )
    for name in PEERS.keys() & engines:  # before anything is timed
        require_peer(name)
    if "flower" in engines:
        require_simulation()
    if strategy:
        STRATEGIES.require(strategy)
    asked = [replace(case, strategy=strategy or case.strategy, device=device) for case in map(case_of, cases)]
    documents = {case.name: _bench_case(case, engines, repeats, on_line) for case in asked}
    peers = {name: metadata.version(peer.package) for name, peer in PEERS.items() if name in engines}
    return {"kind": "bench engine", "machine": _machine() | {"peers": peers}, "repeats": repeats, "cases": documents}


def _bench_case(
    case: Case, engines: Sequence[str], repeats: int, on_line: Callable[[str], None] | None
) -> dict[str, Any]:
    costs: dict[str, list[Cost]] = {name: [] for name in engines if case.plain or name not in PLAIN}
    for repeat in range(repeats):
        for name in costs:
            costs[name].append(run := alone(ENGINES[name], case))
            if on_line:
                on_line(f"{case.name}, {name}, run {repeat + 1} of {repeats}: {min(run.cpu):.3f} CPU seconds a round")
    bare = {
        clock: _fastest(getattr(run, clock) for run in costs["bare"]) if "bare" in costs else None
        for clock in ("cpu", "wall")
    }
    ours = costs["fednorm"][0].tensors
    return {
        "summary": case.summary,
        "clients": case.clients,
        "rounds": case.rounds,
        "engines": {name: _engine_document(runs, case, bare, ours) for name, runs in costs.items()},
    }


def _engine_document(
    runs: Sequence[Cost], case: Case, bare: Mapping[str, float | None], ours: Mapping[str, Tensor]
) -> dict[str, Any]:
    cpu, wall = _fastest(run.cpu for run in runs), _fastest(run.wall for run in runs)
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "ratio": cpu / bare["cpu"] if bare["cpu"] else None,
        "wall_ratio": wall / bare["wall"] if bare["wall"] else None,
        "overhead_ms": 1000 * (cpu - bare["cpu"]) / case.clients if bare["cpu"] is not None else None,
        "startup_cpu_seconds": min(run.startup_cpu for run in runs),
        "startup_wall_seconds": min(run.startup_wall for run in runs),
        "memory_mb": min(run.memory for run in runs) / 1e6,
        "difference": max(_difference(run.tensors, ours) for run in runs),
        "all_cpu_seconds": [list(run.cpu) for run in runs],
    }


def _fastest(runs: Iterable[Sequence[float]]) -> float:
    return min(min(rounds) for rounds in runs)


def _difference(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a weight that both have: not every simulator averages buffers, or counters."""
    shared = [key for key in tensors.keys() & others.keys() if others[key].is_floating_point()]
    return max(float((tensors[key].double() - others[key].double()).abs().max()) for key in shared)


def _machine() -> dict[str, Any]:
    cores = available_cores()
    return {
        "cores": cores,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": THREADS,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


def bench_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a result of :func:`bench_engine`, a row an engine and case."""
    rows = [
        (
            f"{name}: {engine}",
            f"{cost['cpu_seconds']:.3f}",
            f"{cost['wall_seconds']:.3f}",
            "–" if cost["ratio"] is None else f"{cost['ratio']:.2f}×",
            "–" if cost["wall_ratio"] is None else f"{cost['wall_ratio']:.2f}×",
            "–" if cost["overhead_ms"] is None else f"{cost['overhead_ms']:+.2f}",
            f"{cost['startup_wall_seconds']:.1f}",
            f"{cost['startup_cpu_seconds']:.1f}",
            f"{cost['memory_mb']:.0f}",
            f"{cost['difference']:.1e}" if cost["difference"] else "0",
        )
        for name, case in result["cases"].items()
        for engine, cost in case["engines"].items()
    ]
    columns = (
        "case: engine",
        "CPU s a round",
        "wall s a round",
        "CPU to bare",
        "wall to bare",
        "ms a client over bare",
        "start s",
        "start CPU s",
        "memory MB",
        "largest difference",
    )
    machine, found = result["machine"], result["machine"]["versions"]
    notes = (
        *(f"{name}: {case['summary']}; {case['rounds']} timed rounds." for name, case in result["cases"].items()),
        f"Fastest round of {result['repeats']} runs; start: until the first round's end, which is not timed; workers "
        "(one a core, two at least) and flower: all processes; memory: the most of all, what they share counted once; "
        "bare does federated averaging alone; largest difference: of a final weight to fednorm's (another memory "
        "layout rounds differently, which training amplifies).",
        f"{machine['cores']} cores ({machine['cpu_capability']}), {machine['torch_threads']} PyTorch thread a process, "
        f"load average {machine['load_average']}; "
        f"torch {found['torch']}, flwr {found['flwr']}, Python {found['python']}.",
        *_peers_note(result),
    )
    return Table("Engine", columns, tuple(rows), notes)


def _peers_note(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know of the other simulators that were run, if any were."""
    peers: Mapping[str, str] = result["machine"]["peers"]
    if not peers:
        return []
    shown = ", ".join(f"{name} {version}" for name, version in peers.items())
    return [
        f"{shown}: one process, float images in memory in each client's order, all test images in one pass. blazefl "
        "takes PyTorch's default memory layout alone; pfl averages parameters, and no running statistics.",
    ]
