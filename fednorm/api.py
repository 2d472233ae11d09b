"""The Python entry: runs from keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednorm.config import merge
from fednorm.continual_config import ONLINE
from fednorm.registry import resolve_config, resolve_continual

if TYPE_CHECKING:
    from fednorm.continual.simulate import StreamObserver
    from fednorm.federated.server import Observer


def federated(
    *,
    strategy: str = "fedavg",
    data: str = "digits_mini",
    norm: str | None = None,
    model: str | None = None,
    rounds: int = 10,
    seed: int = 1,
    data_dir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    runs: str | Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run a federation in this process.

    Args:
        strategy: The strategy's name.
        data: The benchmark's name.
        norm: The norm's name; the strategy's own if None.
        model: The model's name; the default if None.
        rounds: Rounds of communication.
        seed: Of every random stream.
        data_dir: The folder of the real data, where the benchmark needs one.
        config: Any other configuration keys, as nested dictionaries: ``{"train": {"learning_rate": 0.1}}``.
        runs: The folder of records, or None to write nothing.
        observer: Is told how the run goes.

    Returns:
        The result: ``plan``, ``rounds``, ``final`` (``per_domain``, ``mean``, ``worst``), ``evaluation``, ``run``,
        ``config``.

    Raises:
        FedNormError: The configuration cannot be run, every client failed, or the record cannot be written.
    """
    named: dict[str, Any] = {
        "seed": seed,
        "strategy": {"name": strategy},
        "data": {"name": data, **({"dir": str(data_dir)} if data_dir is not None else {})},
        "rounds": {"num_rounds": rounds},
        **({"norm": {"name": norm}} if norm is not None else {}),
        **({"model": {"name": model}} if model is not None else {}),
    }
    resolved = resolve_config(merge(named, config or {}))
    from fednorm.federated.simulate import simulate  # takes seconds; a mistake is told before

    return simulate(resolved, runs=Path(runs) if runs is not None else None, observer=observer)


def continual(
    *,
    scenario: str = "split_digits",
    learner: str = "er_ace",
    norm: str | None = None,
    model: str | None = None,
    data: str | None = None,
    data_dir: str | Path | None = None,
    online: bool = False,
    seed: int = 1,
    config: Mapping[str, Any] | None = None,
    runs: str | Path | None = None,
    observer: StreamObserver | None = None,
) -> dict[str, Any]:
    """Train a learner on a stream in this process.

    Args:
        scenario: The scenario's name.
        learner: The learner's name.
        norm: The norm's name; batch normalization if None.
        model: The model's name; the scenario's own if None.
        data: The benchmark, where the scenario leaves a choice.
        data_dir: The folder of the real data, where the benchmark needs one.
        online: One pass over each experience, 10 images a step.
        seed: Of every random stream.
        config: Any other configuration keys, as nested dictionaries: ``{"train": {"learning_rate": 0.1}}``.
        runs: The folder of records, or None to write nothing.
        observer: Is told how the run goes.

    Returns:
        The result: ``accuracy_matrix``, ``final`` (``average_accuracy``, ``forgetting_max_minus_last``, ...),
        ``experiences``, ``run``, ``config``.

    Raises:
        FedNormError: The configuration cannot be run, or the record cannot be written.
    """
    where = {"name": data, "dir": None if data_dir is None else str(data_dir)}
    named: dict[str, Any] = {
        "kind": "continual",
        "seed": seed,
        "scenario": {"name": scenario},
        "learner": {"name": learner},
        "data": {key: value for key, value in where.items() if value is not None},
        **({"train": ONLINE} if online else {}),
        **({"norm": {"name": norm}} if norm is not None else {}),
        **({"model": {"name": model}} if model is not None else {}),
    }
    resolved = resolve_continual(merge(named, config or {}))
    from fednorm.continual.simulate import simulate  # takes seconds; a mistake is told before

    return simulate(resolved, runs=Path(runs) if runs is not None else None, observer=observer)
