"""Does a run compute the same bits again: a second time, after a cut, and with its clients side by side?

``fednorm verify determinism`` asks it of any configuration, on the machine at hand. What is compared is everything that
a record keeps of the tensors: the server's, each client's own, and what clients were evaluated with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fednorm.config import RunConfig
from fednorm.federation.executors import Executor
from fednorm.federation.executors.choice import executor_of, obstacle_of
from fednorm.federation.executors.workers import Workers
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench, workbench_of
from fednorm.records.states import tensors_of
from fednorm.report.table import Table
from fednorm.streams.simulate import simulate as simulate_stream
from fednorm.streams.workbench import ContinualWorkbench

WORKERS = (1, 2, 4)
"""How many processes take the clients side by side, however many cores there are: bits are asked for, not speed."""

ROUNDS = 4
"""Rounds of each run, where the configuration has more and nobody says how many."""

KEPT = ("model", "clients", "personal")
"""The files of a record that hold tensors."""


@dataclass(frozen=True)
class Check:
    """What came of one way to run a configuration.

    Attributes:
        name: The way, e.g. ``2 workers``.
        tensors: How many tensors were compared.
        different: How many differ in a bit, or are there in one of the two runs alone.
        largest: The largest difference of two values.
    """

    name: str
    tensors: int
    different: int
    largest: float

    @property
    def same(self) -> bool:
        """Whether all are the same."""
        return not self.different


def checks_of(config: RunConfig, folder: Path, told: Callable[[str], None]) -> Iterator[Check]:
    """Run a configuration in several ways, and yield what came of each.

    Args:
        config: The configuration, of either kind.
        folder: Where records go.
        told: Is told what there is to say meanwhile.
    """
    plain = replace(config, workers=1)
    first = _tensors(plain, folder / "first")
    yield _check("run again", first, _tensors(plain, folder / "again"))
    yield _check("cut short and gone on with", first, _cut(plain, folder / "cut", told))
    if config.kind == "continual":
        return
    if obstacle := obstacle_of(config):
        told(f"not run with workers: {obstacle}")
        return
    for count in WORKERS:
        name = f"{count} worker{'s'[: count > 1]}"
        yield _check(name, first, _tensors(plain, folder / str(count), executor=partial(Workers, count=count)))


def determinism_table(checks: list[Check], title: str) -> Table:
    """Return the table of what came of each way."""
    rows = [
        (check.name, "the same" if check.same else "DIFFERENT", str(check.tensors), str(check.different), _shown(check))
        for check in checks
    ]
    columns = ("against a first run", "bits", "tensors", "different", "largest difference")
    return Table(title, columns, tuple(rows), ())


def _shown(check: Check) -> str:
    return f"{check.largest:.1e}" if check.different else "0"


def _check(name: str, first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Check:
    common = first.keys() & other.keys()
    unlike = [key for key in common if not torch.equal(first[key], other[key])]
    gaps = [(first[key].double() - other[key].double()).abs().max().item() for key in unlike]
    alone = first.keys() ^ other.keys()
    return Check(name, len(first.keys() | other.keys()), len(unlike) + len(alone), max(gaps, default=0.0))


def _tensors(
    config: RunConfig, runs: Path, *, executor: Callable[[Workbench], Executor] = executor_of
) -> dict[str, Tensor]:
    folder = Path(_simulate(config, runs, None, executor)["run"])
    files = [folder / f"{name}.safetensors" for name in KEPT]
    whole = {f"{file.stem}/{key}": t for file in files if file.is_file() for key, t in load_file(file).items()}
    return whole | {f"clients/{key}": tensor for key, tensor in tensors_of(folder, config.hash).items()}


def _cut(config: RunConfig, runs: Path, told: Callable[[str], None]) -> dict[str, Tensor]:
    """Return the tensors of a run that is cut in the middle, and gone on with."""
    what, after = _middle(config)
    try:
        _simulate(config, runs, _Cut(after), executor_of)
    except KeyboardInterrupt:
        told(f"cut after {what} {after}, going on")
    return _tensors(config, runs)


def _middle(config: RunConfig) -> tuple[str, int]:
    """Return where a run is cut, a round or a step; 0 where it is too short for that."""
    if config.kind == "continual":
        return "step", sum(ContinualWorkbench(config).steps) // 2
    return "round", workbench_of(config).num_rounds // 2


def _simulate(
    config: RunConfig, runs: Path, cut: _Cut | None, executor: Callable[[Workbench], Executor]
) -> dict[str, Any]:
    if config.kind == "continual":
        return simulate_stream(config, runs=runs, observer=cut)
    return simulate(config, runs=runs, observer=cut, executor=executor)


class _Cut:
    """An observer that cuts a run short after some rounds or steps, as a kill would."""

    def __init__(self, after: int) -> None:
        self._after = after

    def begin(self, *_: Any) -> None:
        """Do nothing."""

    def round(self, line: Any) -> None:
        """Stop a federation at the chosen round."""
        self.step(line["round"])

    def step(self, done: int) -> None:
        """Stop a stream at the chosen step."""
        if done == self._after:
            raise KeyboardInterrupt

    def experience(self, line: Any) -> None:
        """Do nothing."""
