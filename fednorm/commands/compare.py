"""``fednorm compare``: a study's runs, several at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fednorm.cli import err, fail, out, print_json
from fednorm.commands.report import show, tables
from fednorm.config import merge, override
from fednorm.continual_config import ContinualConfig
from fednorm.errors import ConfigError, unknown_name
from fednorm.report import stream_table, table
from fednorm.study.grid import AnyConfig, read_study, run_study

RECIPES = Path(__file__).parent.parent / "study" / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the studies that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find_study(study: str) -> Path:
    """Return a study's file: a path, or the name of one that ships.

    Raises:
        ConfigError: A path that does not exist.
        UnknownNameError: A name that does not ship.
    """
    path = Path(study)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ConfigError(
                f"There is no study file {path}. Give a TOML file, or one of {', '.join(recipe_names())}."
            )
        return path
    name = study.replace("-", "_")
    if name not in recipe_names():
        raise unknown_name("study", study, recipe_names())
    return RECIPES / f"{name}.toml"


def run_compare(
    study: str,
    *,
    data_dir: Path | None,
    runs: Path | None,
    jobs: int,
    settings: Sequence[str],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a study and print its table; exit code 2 if a run failed, after all others have finished."""
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1; got {jobs}.")
    path = find_study(study)
    overrides: dict[str, Any] = {"data": {"dir": str(data_dir)}} if data_dir is not None else {}
    for setting in settings:
        overrides = merge(overrides, override(setting))
    configs = read_study(path, overrides)
    folder = runs or Path("runs") / path.stem
    if dry_run:
        listed = [{"hash": config.hash, "config": config.to_dict()} for config in configs]
        return print_json({"runs": listed}) if as_json else out().print("\n".join(map(_label, configs)))
    results, failures = _run_all(configs, folder, jobs)
    if as_json:
        print_json({"results": results, "failures": failures, "out": str(folder)})
    else:
        for made in tables(results):
            show(made, markdown=False)
    if failures:
        fail(f"{len(failures)} of {len(configs)} runs failed; the first: {failures[0]['reason']}")
    return None


def _run_all(
    configs: Sequence[AnyConfig], folder: Path, jobs: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    console = err()
    by_hash: dict[str, dict[str, Any]] = {}
    failures: list[dict[str, str]] = []

    def on_done(config: AnyConfig, result: dict[str, Any] | None, reason: str) -> None:
        done = len(by_hash) + len(failures) + 1
        if result is None:
            failures.append({"run": _label(config), "reason": reason})
            console.print(f"[{done}/{len(configs)}] {_label(config)}: failed: {reason}", markup=False, soft_wrap=True)
        else:
            by_hash[config.hash] = result
            shown = f"{100 * _score(result):.1f} %"
            console.print(f"[{done}/{len(configs)}] {_label(config)}: {shown}", markup=False, soft_wrap=True)

    run_study(configs, runs=folder, jobs=jobs, on_done=on_done)
    return [by_hash[config.hash] for config in configs if config.hash in by_hash], failures


def _score(result: Mapping[str, Any]) -> float:
    """Return the accuracy that a line of progress shows."""
    final = result["final"]
    if result["kind"] == "federated":
        return float(final["mean"])
    average = final["average_accuracy"]
    return float(final["train_accuracy"] if average is None else average)


def _label(config: AnyConfig) -> str:
    name_of = stream_table.method_name if isinstance(config, ContinualConfig) else table.method_name
    clipping = f" agc {config.train.agc:g}" if config.train.agc else ""
    name = name_of({"config": config.to_dict()})
    return f"{config.hash} {name} lr {config.train.learning_rate:g}{clipping} seed {config.seed}"
