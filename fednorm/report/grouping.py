"""Which results belong together: kinds, what was scored, names, settings, and that one mean has one set of data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fednorm.errors import ConfigError, canonical
from fednorm.records.result import result_of
from fednorm.report._common import Result, flat, name_of, settings

SECTIONS_OF_DATA = ("data.", "scenario.")
"""Settings that say which data a run has; where they differ, methods are not paired, nor ranked together."""


def kind_of(result: Result) -> str:
    """Return a result's kind: ``federated`` or ``continual``."""
    return result_of(result).kind


def scored_on(result: Result) -> tuple[str, str, str]:
    """Return kind, title of the data, and split: results that differ in them never stand in one table."""
    return kind_of(result), result["data"]["title"], result["config"]["evaluate"]["split"]


def score_of(result: Result, key: str) -> float | None:
    """Return a score of a result; None where it was not measured, or is not finite.

    Args:
        result: A result.
        key: The dotted key within its ``final``; names of domains may have dots of their own.
    """
    value: Any = result["final"]
    while isinstance(value, Mapping):
        if key in value:
            value, key = value[key], ""
            continue
        head, _, key = key.partition(".")
        value = value.get(head)
    if key or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def matches(result: Result, subset: Mapping[str, Any]) -> bool:
    """Return whether a result has all settings of a nested subset of a configuration.

    What the configuration leaves open has the value with which the run resolved it. Names are alike in either
    spelling.
    """
    return covers(resolved(result), subset)


def covers(own: Mapping[str, Any], subset: Mapping[str, Any]) -> bool:
    """Return whether a :func:`resolved` configuration has all settings of a nested subset."""
    return all(key in own and _plain(key, own[key]) == _plain(key, value) for key, value in flat(subset).items())


def resolved(result: Result) -> dict[str, Any]:
    """Return a result's settings, seed and kind as dotted keys, options that it left at their defaults among them."""
    options = {name: result.get(name) or {} for name in ("norm", "strategy", "learner", "scenario")}
    return {**flat(options), **settings(result), "seed": result["config"]["seed"], "kind": kind_of(result)}


def data_settings(own: Mapping[str, Any]) -> str:
    """Return those of the settings of a result that say which data it has, as text that is equal where they are."""
    return repr(sorted((key, value) for key, value in own.items() if key.startswith(SECTIONS_OF_DATA)))


def unique(results: Sequence[Result]) -> list[Result]:
    """Return each run once, as it came first.

    Raises:
        ConfigError: A run comes twice and was made on different data each time.
    """
    first: dict[str, Result] = {}
    for result in results:
        earlier = first.setdefault(result["hash"], result)
        _require_same(earlier, result, "digest", earlier["data"].get("digest"), result["data"].get("digest"))
    return list(first.values())


def require_same_data(results: Sequence[Result]) -> None:
    """Refuse results that were made on different data though their settings ask for the same.

    The digest of a record's data depends on the seed wherever the seed deals or orders them, and on the model's input
    size: runs must share it where they share seed and model. The numbers of images do not depend on the seed.

    Args:
        results: Results that are to stand in one comparison.

    Raises:
        ConfigError: Two of them have different data; the message names both.
    """
    seen: dict[tuple[Any, ...], tuple[Result, Any]] = {}
    for result in results:
        own = settings(result)
        asked, seed = data_settings(own), result["config"]["seed"]
        told: dict[tuple[Any, ...], Any] = {
            ("digest", seed, own["model.name"]): result["data"].get("digest"),
            **{(f"{name} images",): count for name, count in _images(result, own).items()},
        }
        for what, value in told.items():
            if value is not None:
                earlier, expected = seen.setdefault((asked, *what), (result, value))
                _require_same(earlier, result, what[0], expected, value)


def require_one_run_a_seed(groups: Mapping[str, Sequence[Result]]) -> None:
    """Refuse a method that has two runs of one seed, e.g. of two versions: a seed that counts twice is no replication.

    Raises:
        ConfigError: There is such a method; the message names both runs.
    """
    for label, group in groups.items():
        seen: dict[int, Result] = {}
        for result in group:
            seed = result["config"]["seed"]
            if (earlier := seen.setdefault(seed, result)) is not result:
                raise ConfigError(
                    f"Runs {earlier['hash']} and {result['hash']} are both {label} with seed {seed}, and a seed counts "
                    "once in a mean. Leave one of them out of the report."
                )


def _require_same(first: Result, second: Result, what: str, expected: Any, found: Any) -> None:
    if expected is None or found is None or expected == found:
        return
    raise ConfigError(
        f"Runs {_told(first)} and {_told(second)} ask for the same data and had different data ({what}: {expected} "
        f"and {found}), so they cannot stand in one mean or one comparison. Report them apart, or make one of them "
        "anew on the other's data."
    )


def _told(result: Result) -> str:
    return f"{result['hash']} ({name_of(result)}, seed {result['config']['seed']})"


def _images(result: Result, own: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of images that are the same for every seed, where the record has them.

    A limit on the images of a share leaves none that is: what it cuts depends on how the seed dealt.
    """
    federated = kind_of(result) != "continual"
    limited = any(own.get(f"scenario.{side}_per_experience") for side in ("train", "test"))
    if limited:
        return {}
    capped = own["data.train_per_client"] and own["data.partition"] != "iid"
    counts: dict[str, int] = {}
    for line in result["data"].get("clients" if federated else "experiences", ()):
        parts = {"test": ("test",)} if capped else {"test": ("test",), "training": ("train", "validation")}
        for name, splits in parts.items():
            place = f"{line.get('domain')} {name}" if federated else name
            counts[place] = counts.get(place, 0) + sum(line.get(split, 0) for split in splits)
    return counts


def _plain(key: str, value: Any) -> Any:
    if key.endswith(".name") and isinstance(value, str):
        return canonical(value)
    return list(value) if isinstance(value, tuple) else value
