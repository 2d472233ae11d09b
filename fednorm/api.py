"""The Python entry: runs and studies from keyword arguments, and results as data frames."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednorm.cards import DATA
from fednorm.config import ONLINE, merge, require_online, resolve, with_references
from fednorm.errors import StudyError
from fednorm.records.result import FederatedResult, GridResult, StreamResult

if TYPE_CHECKING:
    import polars
    from torch import nn

    from fednorm.federation.server import Observer
    from fednorm.streams.simulate import StreamObserver


def federated(  # noqa: PLR0913 - by name only
    *,
    strategy: str = "fedavg",
    data: Any = None,
    norm: str | None = None,
    model: str | Callable[..., nn.Module] | None = None,
    scenario: str | None = None,
    learner: str | None = None,
    clients: int | None = None,
    rounds: int = 10,
    seed: int = 1,
    data_dir: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    config: Mapping[str, Any] | None = None,
    runs: str | Path | None = None,
    observer: Observer | None = None,
) -> FederatedResult:
    """Run a federation in this process.

        fednorm.federated(data={"a": (images, labels), "b": (images, labels)})       # arrays or tensors, by domain
        fednorm.federated(data={"a": {"train": (x, y), "test": (x, y)}, "b": ...})   # with test images of their own
        fednorm.federated(data={"mnist": MNIST("data"), "usps": USPS("data")})       # torch Datasets
        fednorm.federated(data=datasets.load_dataset("flwrlabs/pacs"))               # a Hugging Face Dataset(Dict)
        fednorm.federated(data="mypackage.mydata:domains")                           # a callable that returns such data
        fednorm.federated(scenario="domain_digits", learner="er_ace", strategy="fedbn")   # on streams

    Args:
        strategy: The strategy's name.
        data: The benchmark's name (``fednorm list data``), an import path, or data of your own; ``digits_mini`` if
            None, or the scenario's.

            Images are ``uint8``, or floating point in [0, 1]; of shape (N, H, W), (N, H, W, 3) or (N, 3, H, W). A
            dataset is map-style, its items ``(image, label)``. Images are resized to the model's input size, or to
            ``data.image_size``. A domain without test images is split 80/20, stratified, by ``data.split_seed``; the
            result's ``data.notes`` say so. What has no import path is known to this process alone: its runs can be
            recorded and gone on with, where the same data is given again, but no study can be made of it.
        norm: The norm's name; the strategy's own if None.
        model: The model's name, an import path, or what makes one: a callable of ``num_classes``, and of ``norm``,
            ``image_size``, ``in_channels``, ``width`` and ``activation`` what its signature names; the default if None.
        scenario: Where each client learns on a stream of its own: the scenario's name.
        learner: What learns there; ``er_ace`` if None.
        clients: Clients that share the scenario; 5 if None.
        rounds: Rounds of communication; with a scenario, of each experience.
        seed: Of every random stream.
        data_dir: The folder of the real data, where the benchmark needs one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; the CPU if None.
        workers: Processes that take the clients side by side, to the same bits; as many as pay if None.
        config: Any other configuration keys, as nested dictionaries: ``{"train": {"learning_rate": 0.1}}``.
        runs: The folder of records, or None to write nothing.
        observer: Is told how the run goes.

    Returns:
        The result, a dictionary with attributes: ``plan``, ``rounds``, ``final`` (``per_domain``, ``mean``,
        ``worst``), ``evaluation``, ``run``, ``config``; ``frame()``, ``plot()``, ``model(client=3)``.

    Raises:
        FedNormError: The configuration cannot be run, every client failed, or the record cannot be written.

    Example:
        >>> small = {"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}
        >>> result = fednorm.federated(strategy="fedbn", rounds=1, seed=1, config=small)
        >>> sorted(result["final"]["per_domain"])
        ['faint', 'fonts', 'photo', 'scans', 'street']
        >>> result["plan"]["shared"], result["plan"]["local"]
        (12, 25)
    """
    named: dict[str, Any] = {
        "seed": seed,
        "strategy": {"name": strategy},
        "data": {
            **({"name": DATA.add(data)} if data is not None else {}),
            **({"dir": str(data_dir)} if data_dir is not None else {}),
        },
        **_shape(scenario, learner, clients, rounds),
        **({"device": device} if device is not None else {}),
        **({"workers": workers} if workers is not None else {}),
        **({"norm": {"name": norm}} if norm is not None else {}),
        **({"model": {"name": model}} if model is not None else {}),
    }
    resolved = resolve(merge(named, config or {}), only=named["kind"])
    from fednorm.federation.simulate import simulate  # takes seconds; a mistake is told before

    kind = GridResult if resolved.kind == "federated_continual" else FederatedResult
    return kind(simulate(resolved, runs=Path(runs) if runs is not None else None, observer=observer))


def _shape(scenario: str | None, learner: str | None, clients: int | None, rounds: int) -> dict[str, Any]:
    """Return the keys that say whether a federation's clients learn on streams, and for how long."""
    if scenario is None and learner is None and clients is None:
        return {"kind": "federated", "rounds": {"num_rounds": rounds}}
    return {
        "kind": "federated_continual",
        "rounds": {"per_experience": rounds},
        **({"scenario": {"name": scenario}} if scenario is not None else {}),
        **({"learner": {"name": learner}} if learner is not None else {}),
        **({"grid": {"clients": clients}} if clients is not None else {}),
    }


def continual(
    *,
    scenario: str | None = None,
    learner: str = "er_ace",
    norm: str | None = None,
    model: str | Callable[..., nn.Module] | None = None,
    data: Any = None,
    data_dir: str | Path | None = None,
    online: bool = False,
    seed: int = 1,
    device: str | None = None,
    config: Mapping[str, Any] | None = None,
    runs: str | Path | None = None,
    observer: StreamObserver | None = None,
) -> StreamResult:
    """Train a learner on a stream in this process.

    Args:
        scenario: The scenario's name; by default ``split_digits``, or ``split`` of data of your own.
        learner: The learner's name.
        norm: The norm's name; batch normalization if None.
        model: The model's name, an import path, or what makes one, as in :func:`federated`; the scenario's own if None.
        data: The benchmark, or data of your own in any of the forms that :func:`federated` takes, where the scenario
            leaves a choice: ``continual(data={"a": (images, labels), "b": ...})`` learns its classes one after
            another, and with ``scenario="domain_digits"`` its domains.
        data_dir: The folder of the real data, where the benchmark needs one.
        online: One pass over each experience, 10 images a step; ``config`` may change the latter.
        seed: Of every random stream.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; the CPU if None.
        config: Any other configuration keys, as nested dictionaries: ``{"train": {"learning_rate": 0.1}}``.
        runs: The folder of records, or None to write nothing.
        observer: Is told how the run goes.

    Returns:
        The result, a dictionary with attributes: ``accuracy_matrix``, ``final`` (``average_accuracy``,
        ``forgetting_max_minus_last``, ...), ``experiences``, ``run``, ``config``; ``frame()``, ``plot()``, ``model()``.

    Raises:
        FedNormError: The configuration cannot be run (as ``online`` with more than one epoch), or the record cannot be
            written.

    Example:
        >>> small = {"scenario": {"train_per_experience": 10}, "model": {"width": 4}}
        >>> result = fednorm.continual(learner="naive", norm="group_norm", online=True, seed=1, config=small)
        >>> len(result["accuracy_matrix"])
        5
    """
    where = {"name": None if data is None else DATA.add(data), "dir": None if data_dir is None else str(data_dir)}
    named: dict[str, Any] = {
        "kind": "continual",
        "seed": seed,
        **({"scenario": {"name": scenario}} if scenario is not None else {}),
        "learner": {"name": learner},
        "data": {key: value for key, value in where.items() if value is not None},
        **({"train": ONLINE} if online else {}),
        **({"device": device} if device is not None else {}),
        **({"norm": {"name": norm}} if norm is not None else {}),
        **({"model": {"name": model}} if model is not None else {}),
    }
    resolved = resolve(merge(named, config or {}), only="continual")
    if online:
        require_online(resolved)
    from fednorm.streams.simulate import simulate  # takes seconds; a mistake is told before

    return StreamResult(simulate(resolved, runs=Path(runs) if runs is not None else None, observer=observer))


def compare(
    study: str | Path | Mapping[str, Any],
    *,
    data_dir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    jobs: int = 1,
    runs: str | Path | None = None,
    select_on_test: bool = False,
) -> polars.DataFrame:
    """Run a study, or what is missing of it, and return a row a run.

    With more than one job, every run has a process of its own, which imports the caller's main module: a script needs
    its ``if __name__ == "__main__":``; a notebook does not.

    Args:
        study: A TOML file, the name of a study that ships (``fednorm recipes``), or a study's tables as nested
            dictionaries: ``{"base": {...}, "points": [...], "grid": {"seed": [1, 2, 3]}}``. Data of your own is its
            ``data.name``: an import path, or a module's function itself.
        data_dir: The folder of the real data, where the study needs one.
        config: Configuration keys laid over every run, as nested dictionaries.
        jobs: Runs at a time.
        runs: The folder of records; ``runs/STUDY`` by default, ``runs/study`` for tables.
        select_on_test: Whether hyper-parameters are chosen on test images; every table will say so.

    Returns:
        The reported runs, as :func:`load` returns them.

    Raises:
        FedNormError: The study is wrong.
        StudyError: A run failed; all others have finished.
        KeyboardInterrupt: The user stopped it; the same call goes on.

    Example:
        >>> small = {"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}
        >>> study = {
        ...     "base": {**small, "rounds": {"num_rounds": 1}},
        ...     "points": [{"strategy": {"name": "fedavg"}}, {"strategy": {"name": "fedbn"}}],
        ... }
        >>> fednorm.compare(study, runs=folder, jobs=1)["method"].to_list()
        ['fedavg', 'fedbn']
    """
    from fednorm.report.frame import frame
    from fednorm.study.recipes import find_study
    from fednorm.study.runner import execute
    from fednorm.study.study import make_study, read_study

    overrides = merge({"data": {"dir": str(data_dir)}} if data_dir is not None else {}, config or {})
    overrides = with_references(overrides)
    if isinstance(study, Mapping):
        made = make_study(with_references(study), overrides=overrides, select_on_test=select_on_test)
    else:
        made = read_study(find_study(str(study)), overrides, select_on_test=select_on_test)
    folder = Path(runs) if runs is not None else Path("runs") / made.name
    outcome = execute(made, runs=folder, jobs=jobs)
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.failures:
        told = "; ".join(f"{failure.label}: {failure.reason}" for failure in outcome.failures)
        raise StudyError(
            f"{len(outcome.failures)} of {outcome.planned} runs failed: {told} The others are in {folder}."
        )
    return frame(outcome.results)


def load(*paths: str | Path) -> polars.DataFrame:
    """Return the finished runs of some folders as a data frame, a row a run.

    Args:
        paths: Records, folders of records, or summaries; what cannot be read is left out and named by a warning.

    Returns:
        A frame as :func:`fednorm.report.frame.frame` describes: ``method``, ``seed``, every final score (shares in
        [0, 1]; ``accuracy.DOMAIN``), and the configuration as dotted columns.

    Raises:
        RecordError: A path does not exist, or there is no finished run in any.

    Example:
        >>> small = {"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}
        >>> _ = fednorm.federated(strategy="fedavg", rounds=1, config=small, runs=folder)
        >>> fednorm.load(folder)["method"].to_list()
        ['fedavg']
    """
    from fednorm.records.results import load as load_results
    from fednorm.report.frame import frame

    loaded = load_results([Path(path) for path in paths])
    for problem in loaded.problems:
        warnings.warn(problem, stacklevel=2)
    return frame(loaded.results)
