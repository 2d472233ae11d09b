"""Studies: grids of runs from one TOML file, each run resumable, several at a time.

[base]                       # configuration keys that all runs share
kind = "federated"            # or "continual"
data = { name = "digits", merge = true, train_per_client = 743 }

[[points]]                   # optional: named methods, each a table of keys laid over the base
strategy.name = "fedbn"

[grid]                       # lists; every combination with every point is a run
seed = [1, 2, 3]
train.learning_rate = [0.01, 0.1]
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fednorm.config import RunConfig, merge, read_config
from fednorm.continual_config import ContinualConfig
from fednorm.errors import ConfigError, FedNormError
from fednorm.registry import resolve

AnyConfig = RunConfig | ContinualConfig

SECTIONS = ("base", "points", "grid")

log = logging.getLogger("fednorm")


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> list[AnyConfig]:
    """Read a study's file and return its runs' configurations, all of them checked.

    Args:
        path: The TOML file.
        overrides: Keys laid over every run, e.g. the data folder.

    Raises:
        ConfigError: The file is not a study, or a run's configuration is wrong.
    """
    study = read_config(path)
    odd = [key for key in study if key not in SECTIONS]
    if odd or "base" not in study:
        raise ConfigError(
            f"{path} must have a [base] table and may have [[points]] and a [grid] table of lists; "
            f"got {', '.join(study) or 'an empty file'}."
        )
    base, points, grid = study["base"], study.get("points", [{}]), study.get("grid", {})
    if not isinstance(base, Mapping) or not isinstance(grid, Mapping):
        raise ConfigError(f"{path}: [base] and [grid] are tables of keys; got base = {base!r}, grid = {grid!r}.")
    if not isinstance(points, list) or not points or not all(isinstance(point, Mapping) for point in points):
        raise ConfigError(f"{path}: [[points]] are tables of keys, one a method; got {points!r}.")
    return expand(base, points, grid, overrides or {})


def expand(
    base: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> list[AnyConfig]:
    """Return the configurations of every point with every combination of the grid's lists, in that order.

    Args:
        base: Keys that all runs share.
        points: Keys of each method, laid over the base.
        grid: Lists of values at the end of nested keys, laid over the points.
        overrides: Keys laid over everything.

    Returns:
        The configurations, each once.

    Raises:
        ConfigError: A key of the grid is no list of values, or a configuration is wrong.
    """
    axes = list(_axes(grid, ()))
    runs: dict[str, AnyConfig] = {}
    for point in points:
        for values in itertools.product(*(choices for _, choices in axes)):
            nested: dict[str, Any] = {}
            for (path, _), value in zip(axes, values, strict=True):
                nested = merge(nested, _nest(path, value))
            config = resolve(merge(merge(merge(base, point), nested), overrides))
            runs.setdefault(config.hash, config)
    return list(runs.values())


def _axes(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _axes(value, (*path, key))
        elif isinstance(value, list) and value:
            yield (*path, key), value
        else:
            raise ConfigError(f"grid.{'.'.join((*path, key))} must be a list of one value or more; got {value!r}.")


def _nest(path: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def run_study(
    configs: Sequence[AnyConfig],
    *,
    runs: Path,
    jobs: int,
    on_done: Callable[[AnyConfig, dict[str, Any] | None, str], None],
) -> None:
    """Run configurations, ``jobs`` at a time, each in a process of its own; finished ones are read back.

    Args:
        configs: The runs.
        runs: The folder of records.
        jobs: Processes at a time.
        on_done: Called as each run ends, with its result, or None and the reason it failed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[tuple[dict[str, Any] | None, str]], AnyConfig] = {
            pool.submit(_run, config, runs): config for config in configs
        }
        for future in as_completed(futures):
            try:
                result, reason = future.result()
            except Exception as error:  # a mistake of ours, or a process that was killed: the other runs go on
                log.debug("run %s failed", futures[future].hash, exc_info=True)
                result, reason = None, f"{type(error).__name__}: {error}"
            on_done(futures[future], result, reason)


def _run(config: AnyConfig, runs: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return _simulate(config, runs), ""
    except FedNormError as error:
        return None, str(error)


def _simulate(config: AnyConfig, runs: Path) -> dict[str, Any]:
    """Run one configuration of either kind; what trains is imported only here, in the run's own process."""
    if isinstance(config, ContinualConfig):
        from fednorm.continual.simulate import simulate as simulate_stream

        return simulate_stream(config, runs=runs)
    from fednorm.federated.simulate import simulate

    return simulate(config, runs=runs)
