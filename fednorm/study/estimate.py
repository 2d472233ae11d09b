"""How long a run of either kind will take on this machine: its images counted, a few of its own steps timed.

The images are counted in the data folder where one is given and holds the data; else the published sizes of the data
sets are taken, and the estimate says so. The steps are timed on what was counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any, Generic, TypeVar

from fednorm.cards import DATA
from fednorm.config import MACHINE, Kind, RunConfig
from fednorm.data.benchmarks import Reader
from fednorm.data.published import Published
from fednorm.errors import DataError
from fednorm.federated_continual import estimate as of_grids
from fednorm.federation import estimate as of_rounds
from fednorm.streams import estimate as of_streams
from fednorm.threads import torch_threads
from fednorm.training.work import Work

T = TypeVar("T")

BESIDE = ("seed", "data", "scenario", "rounds", "evaluate", "sources")
"""Sections that do not enter what a step costs."""


@dataclass(frozen=True)
class Estimate:
    """How long a run will take.

    Attributes:
        seconds: About so long, on a core of its own (on ``threads`` cores).
        basis: What was timed and what was counted, for a reader.
    """

    seconds: float
    basis: str


_WAYS: Mapping[Kind, ModuleType] = {
    "federated": of_rounds,
    "continual": of_streams,
    "federated_continual": of_grids,
}
"""What loads a kind's data (``load``), counts its work (``work``), and times it (``measure``)."""


@dataclass(frozen=True)
class _Like(Generic[T]):
    """Something that stands for all with the same key, in a cache."""

    key: str
    one: T = field(compare=False)


def estimate_seconds(config: RunConfig) -> Estimate:
    """Return about how long a run will take on this machine.

    Steps are timed once for all runs of a process that differ in nothing but seeds, rates, rounds and data of one image
    size; images are counted once for all that differ in nothing but seeds and methods.

    Args:
        config: The run's configuration.

    Raises:
        FedNormError: The configuration does not fit together, or neither a folder nor a publication tells how much
            data there is.
    """
    plain = config.to_dict()
    with torch_threads(config.threads):
        counted = {key: plain.get(key) for key in ("kind", "data", "scenario", "model")}
        data, basis = _data(_Like(json.dumps(counted), config))
        each = _each(_Like(json.dumps(_sizing(config)), (config, data)))
        work: Work = _WAYS[config.kind].work(config, data)
        return Estimate(work.times(each), basis)


def seconds_of(bench: Any) -> float:
    """Return about how long the run of a workbench of any kind will take; its model may be trained."""
    seconds: float = _WAYS[bench.config.kind].estimate_seconds(bench)
    return seconds


def _sizing(config: RunConfig) -> dict[str, Any]:
    """Return what a step's time depends on: every option with its value, of rates only whether they are 0."""
    size = config.data.image_size or config.model.card.input_size
    sizing: dict[str, Any] = {"size": size, "threads": config.threads} | {key: getattr(config, key) for key in MACHINE}
    for name, section in config.to_dict().items():
        if isinstance(section, dict) and name not in BESIDE:
            values = section | getattr(getattr(config, name), "values", {})
            sizing[name] = {key: bool(v) if isinstance(v, float) else v for key, v in values.items()}
    return sizing


@cache
def _each(like: _Like[tuple[RunConfig, Any]]) -> Work:
    config, data = like.one
    each: Work = _WAYS[config.kind].measure(config, data)
    return each


@cache
def _data(like: _Like[RunConfig]) -> tuple[Any, str]:
    """Return a run's clients or experiences, and a sentence on where their images were counted."""
    config = replace(like.one, data=like.one.data.replace(download=False))
    load, data = _WAYS[config.kind].load, config.data
    try:
        place = data.dir or ("the embedded data" if DATA[data.name].ships else data.name)
        return load(config, Reader), f"Images counted in {place}."
    except DataError as error:
        try:
            return load(
                config, Published
            ), "Published sizes of the data; with its folder (--data-dir) they are counted."
        except DataError:
            raise error from None


def seconds_at_once(runs: Iterable[float], jobs: int) -> float:
    """Return about how long some runs take, ``jobs`` at a time: their share of the sum, and no less than the longest.

    Args:
        runs: The seconds that each takes alone.
        jobs: Runs at a time, each on a core of its own.
    """
    seconds = list(runs)
    return max([sum(seconds) / jobs, *seconds, 0.0])
