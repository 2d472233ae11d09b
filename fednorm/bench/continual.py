"""``fednorm bench continual``: what a step on a stream costs here, beside a bare PyTorch loop and Avalanche's own.

Every engine trains on the same stream from the same weights; the first experience warms up and fills the memory, the
steps of the second are timed, replay included. Evaluation and records are left out. The bare loop and ours end with the
same weights, which is checked; Avalanche's strategies draw other batches and fill their memory in another way.

A machine that does other things as well only adds time. So engines take turns within each repetition, every repetition
does the same steps, and of each step the fastest repetition counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fednorm.bench import avalanche_apps
from fednorm.bench.bare_stream import PaddedImages, experience_replay_ace
from fednorm.bench.stream_case import NUM_CLASSES, StreamCase, stream_case_of
from fednorm.config import choose
from fednorm.cores import available_cores
from fednorm.errors import ConfigError
from fednorm.records.versions import versions
from fednorm.report.table import Table
from fednorm.rng import torch_seeded
from fednorm.threads import torch_threads

THREADS = 1
"""PyTorch threads of every engine."""


class StepClock:
    """Reads the clocks at the start of an experience and after every step; an Avalanche plugin."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def start(self) -> None:
        """Forget all readings, and read the clocks."""
        self.cpu.clear()
        self.wall.clear()
        self.tick()

    def tick(self) -> None:
        """Read the clocks: the processor's, of all threads of this process, and the wall's."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def stop(self) -> None:
        """Read the clocks, so that what came after the last step belongs to it."""
        self.tick()
        del self.wall[-2], self.cpu[-2]

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:  # noqa: ARG002 - an Avalanche plugin's method
        """Read the clocks; Avalanche calls this after every step."""
        self.tick()


@dataclass(frozen=True, eq=False)
class StepCost:
    """What one run of one engine cost.

    Attributes:
        cpu: Processor seconds of each timed step.
        wall: Wall-clock seconds of each timed step.
        tensors: The final tensors of the network.
    """

    cpu: tuple[float, ...]
    wall: tuple[float, ...]
    tensors: Mapping[str, Tensor]


def run_bare(case: StreamCase) -> StepCost:
    """Run a case in the bare loop."""
    bench = case.workbench()
    train = bench.stream.experiences[0].train
    padding = avalanche_apps.PADDING if case.augment != "none" else 0
    with _timed(clock := StepClock()):
        experience_replay_ace(
            bench.model,
            PaddedImages(train.images, padding=padding, flip=case.augment == "crop_flip", seed=case.seed),
            train.labels,
            [experience.train.index for experience in bench.stream],
            num_classes=NUM_CLASSES,
            batch_size=case.batch_size,
            memory_size=case.memory_size,
            learning_rate=case.learning_rate,
            seed=case.seed,
            on_experience=clock.start,
            on_step=clock.tick,
        )
    return _cost(clock, bench.model)


def run_fednorm(case: StreamCase) -> StepCost:
    """Run a case with our learner, as a run does, without its record and its evaluation."""
    bench = case.workbench()
    with _timed(clock := StepClock()):
        bench.learner.watchers.append(lambda _: clock.tick())
        for experience in bench.training:
            clock.start()
            bench.learner.train(experience)
    return _cost(clock, bench.model)


def run_varied(case: StreamCase, **changed: Any) -> StepCost:
    """Run a case with our learner and something changed, as AdaB2N in place of its normalization."""
    return run_fednorm(replace(case, **changed))


def run_avalanche(case: StreamCase, *, strategy: str, online: bool) -> StepCost:
    """Run a case with a strategy of Avalanche's own.

    Args:
        case: The case.
        strategy: ``er_ace`` or ``replay``.
        online: Whether its experiences are cut into experiences of one batch.
    """
    bench = case.workbench()
    with avalanche_apps.quiet(), torch_seeded(case.seed, "bench", "avalanche"), _timed(clock := StepClock()):
        theirs = avalanche_apps.make_strategy(strategy, case, bench.model)
        theirs.plugins.append(clock)
        for experience in avalanche_apps.make_experiences(case, bench.stream, online=online):
            clock.start()
            theirs.train(experience, [])
    return _cost(clock, bench.model)


@contextmanager
def _timed(clock: StepClock) -> Iterator[None]:
    with torch_threads(THREADS):
        yield
        clock.stop()


def _cost(clock: StepClock, model: torch.nn.Module) -> StepCost:
    cpu, wall = np.diff(clock.cpu).tolist(), np.diff(clock.wall).tolist()
    return StepCost(tuple(cpu), tuple(wall), {key: tensor.clone() for key, tensor in model.state_dict().items()})


STREAM_ENGINES: Mapping[str, Callable[[StreamCase], StepCost]] = {
    "bare": run_bare,
    "fednorm": run_fednorm,
    "adab2n": partial(run_varied, norm="adab2n"),
    "compiled": partial(run_varied, compile=True),
    "adab2n-compiled": partial(run_varied, norm="adab2n", compile=True),
    "avalanche": partial(run_avalanche, strategy="er_ace", online=False),
    "avalanche-online": partial(run_avalanche, strategy="er_ace", online=True),
    "avalanche-replay": partial(run_avalanche, strategy="replay", online=False),
}
"""How each engine runs a case. All but the last, plain replay, train by ER-ACE; ``adab2n`` with another norm."""

COMPILED = ("compiled", "adab2n-compiled")
"""Engines that need a C++ compiler and half a minute to compile; they are run where they are named."""

EXACT = ("bare", "fednorm")
"""The engines that end with the same weights."""


def bench_continual(
    cases: Sequence[str], against: Sequence[str], repeats: int, on_line: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Time fednorm's learner beside others.

    Args:
        cases: Names of :data:`~fednorm.bench.stream_case.STREAM_CASES`.
        against: Names of :data:`STREAM_ENGINES`; ``fednorm`` is always run.
        repeats: How often each engine runs each case.
        on_line: Is told what has been measured, a line at a time.

    Returns:
        A document for JSON: ``machine``, and for each of ``cases`` its ``engines`` with, each a step: ``cpu_ms`` and
        ``wall_ms`` (the mean over the steps of each one's fastest repetition; ``all_cpu_ms`` is each repetition's
        mean), ``ratio`` of processor time to the bare loop's and ``overhead_ms`` over it (None without ``bare``), and
        ``to_fednorm``, its ratio to ours; and ``difference``, the largest of a final weight to ours, None for an
        engine that draws other batches.

    Raises:
        ConfigError: An engine is unknown, or ``repeats`` is less than 1.
        UnknownNameError: There is no such case.
    """
    require_repeats(repeats)
    for name in against:
        choose("against", name, STREAM_ENGINES)
    engines = [name for name in STREAM_ENGINES if name in {*against, "fednorm"}]
    documents = {case.name: _bench_case(case, engines, repeats, on_line) for case in map(stream_case_of, cases)}
    return {"kind": "bench continual", "machine": machine(), "repeats": repeats, "cases": documents}


def require_repeats(repeats: int) -> None:
    """Require a repetition.

    Raises:
        ConfigError: There is none.
    """
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1; got {repeats}.")


def _bench_case(
    case: StreamCase, engines: Sequence[str], repeats: int, on_line: Callable[[str], None] | None
) -> dict[str, Any]:
    costs: dict[str, list[StepCost]] = {name: [] for name in engines}
    for repeat in range(repeats):
        for name in engines:
            costs[name].append(run := STREAM_ENGINES[name](case))
            if on_line:
                on_line(f"{case.name}, {name}, run {repeat + 1} of {repeats}: {1000 * mean(run.cpu):.2f} CPU ms a step")
    bare = fastest([run.cpu for run in costs["bare"]]) if "bare" in costs else None
    ours = fastest([run.cpu for run in costs["fednorm"]])
    weights = costs["fednorm"][0].tensors
    documents = {}
    for name, runs in costs.items():
        cpu = fastest([run.cpu for run in runs])
        documents[name] = {
            "cpu_ms": 1000 * cpu,
            "wall_ms": 1000 * fastest([run.wall for run in runs]),
            "ratio": cpu / bare if bare else None,
            "overhead_ms": 1000 * (cpu - bare) if bare else None,
            "to_fednorm": cpu / ours,
            "difference": max(_difference(run.tensors, weights) for run in runs) if name in EXACT else None,
            "all_cpu_ms": [1000 * mean(run.cpu) for run in runs],
        }
    return {"summary": case.summary, "steps": case.steps, "engines": documents}


def fastest(runs: Sequence[Sequence[float]]) -> float:
    """Return the mean over the steps of the fastest repetition of each: ``mean_i min_r runs[r][i]``."""
    return float(np.min(runs, axis=0).mean())


def _difference(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return max(float((tensors[key].double() - other.double()).abs().max()) for key, other in others.items())


def machine() -> dict[str, Any]:
    """Return what a reader of the numbers must know about where they were measured."""
    cores = available_cores()
    return {
        "cores": cores,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": THREADS,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


def machine_note(facts: Mapping[str, Any]) -> str:
    """Return the note under a table that says where it was measured."""
    found = facts["versions"]
    return (
        f"{facts['cores']} cores ({facts['cpu_capability']}), {facts['torch_threads']} PyTorch thread, load average "
        f"{facts['load_average']}; torch {found['torch']}, avalanche-lib {found['avalanche-lib']}, Python "
        f"{found['python']}."
    )


def bench_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a result of :func:`bench_continual`, a row an engine and case."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else form.format(value)

    rows = [
        (
            f"{name}: {engine}",
            f"{cost['cpu_ms']:.2f}",
            f"{cost['wall_ms']:.2f}",
            cell(cost["ratio"], "{:.2f}×"),
            cell(cost["overhead_ms"], "{:+.2f}"),
            f"{cost['to_fednorm']:.2f}×",
            "0" if cost["difference"] == 0 else cell(cost["difference"], "{:.1e}"),
        )
        for name, case in result["cases"].items()
        for engine, cost in case["engines"].items()
    ]
    columns = (
        "case: engine",
        "CPU ms a step",
        "wall ms a step",
        "CPU to bare",
        "ms over bare",
        "CPU to fednorm",
        "largest difference",
    )
    notes = (
        *(f"{name}: {case['summary']}." for name, case in result["cases"].items()),
        f"Of each step the fastest of {result['repeats']} runs; evaluation left out; largest difference: of a final "
        "weight to fednorm's (Avalanche draws other batches).",
        "adab2n: fednorm with that norm in batch normalization's place; compiled: with compile = true.",
        "avalanche: its ER_ACE, two forward passes a step, memory filled before each experience; avalanche-online: the "
        "same on its split_online_stream, memory filled as samples come; avalanche-replay: its Replay. All on float "
        "tensors in memory, without evaluator and loggers.",
        machine_note(result["machine"]),
    )
    return Table("Step of a stream", columns, tuple(rows), notes)
