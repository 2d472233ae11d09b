"""Grids: lists of values for configuration keys, and the configurations that their combinations make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fednorm.cards import UNIDENTIFIED
from fednorm.config import IMMATERIAL, KeyPath, RunConfig, flatten, merge, nest, resolve
from fednorm.config.adaptations import in_words
from fednorm.errors import ConfigError
from fednorm.limits import shown

MOST_RUNS = 10_000
"""Of a study, and of a search: each is checked and named before the first is run."""

SHORT: Mapping[str, str] = {"train.learning_rate": "lr", "train.agc": "agc"}
"""How labels call settings that they name often."""


@dataclass(frozen=True)
class Axis:
    """A key of a grid with the values it takes.

    Attributes:
        path: The key.
        values: Its values, one or more, none of them twice.
    """

    path: KeyPath
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Planned:
    """A run and where a study names it.

    Attributes:
        config: The run's configuration.
        origin: The point and the values of the grid that it comes from, for a sentence.
    """

    config: RunConfig
    origin: str


def axes(table: Mapping[str, Any], where: str = "grid") -> list[Axis]:
    """Return the axes of a table of lists, in the order of the table.

    Args:
        table: Lists at the end of nested keys.
        where: What the table is called in an error.

    Raises:
        ConfigError: A key has no list, an empty one, or one that names a value twice.
    """
    found = []
    for path, value in flatten(table).items():
        key = f"{where}.{'.'.join(path)}"
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{key} must be a list of one value or more; got {shown(value)}.")
        if len(value) > MOST_RUNS:
            raise ConfigError(f"{key} has {len(value):,} values, and a study has at most {MOST_RUNS:,} runs.")
        if (one := _twice(value)) is not None:
            raise ConfigError(f"{key} names {shown(one)} twice, and both would be one run. Take one of them out.")
        found.append(Axis(path, tuple(value)))
    return found


def _twice(values: Sequence[Any]) -> Any:
    """Return a value that is there twice, None if none is; ``true`` is not 1, though Python finds them equal."""
    seen: set[Any] = set()
    for value in values:
        key = (isinstance(value, bool), repr(value) if isinstance(value, list | Mapping) else value)
        if key in seen:
            return value
        seen.add(key)
    return None


def combinations(of: Sequence[Axis]) -> Iterator[dict[KeyPath, Any]]:
    """Yield every combination of the axes' values, the last axis first; one empty combination where there is none."""
    for values in itertools.product(*(axis.values for axis in of)):
        yield {axis.path: value for axis, value in zip(of, values, strict=True)}


def require_few(of: Iterable[Sequence[Axis]], times: int, where: str, what: str) -> None:
    """Refuse more runs than can be made, by their number alone: none of them is made for it.

    Args:
        of: Spaces, lists of values each, whose combinations are runs.
        times: How many runs each combination is.
        where: What the study is called in an error.
        what: What the runs are: of ``[grid]``, of the search.

    Raises:
        ConfigError: They are more than :data:`MOST_RUNS`.
    """
    sizes = [[len(axis.values) for axis in space] for space in of]
    count = times * sum(map(math.prod, sizes))
    if count > MOST_RUNS:
        told = " + ".join(" x ".join(map(str, space)) or "1" for space in sizes[:3]) + (" + ..." if sizes[3:] else "")
        raise ConfigError(
            f"{where} asks for {shown(count)} runs by {what} ({told} combinations, {times} times), and a study has at "
            f"most {MOST_RUNS:,}. Shorten its lists, or cut it into several studies."
        )


def expand(
    base: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> list[RunConfig]:
    """Return the configurations of every point with every combination of the grid's lists, in that order.

    Args:
        base: Keys that all runs share.
        points: Keys of each method, laid over the base.
        grid: Lists of values at the end of nested keys, laid over the points.
        overrides: Keys laid over everything; one that the grid has takes the place of its list.

    Raises:
        ConfigError: A key of the grid is no list of values, a configuration is wrong, or two are the same.
        UnknownNameError: A name is not registered.
    """
    lists = without(axes(grid), overrides)
    require_few([lists], len(points), "The grid", "its lists")
    planned = [
        Planned(checked(base, point, nest(values), overrides), origin(number, points, values))
        for number, point in enumerate(points)
        for values in combinations(lists)
    ]
    require_different(planned, overrides)
    return [plan.config for plan in planned]


def without(lists: Iterable[Axis], pinned: Mapping[str, Any]) -> list[Axis]:
    """Return the axes whose key is not set by the nested keys ``pinned``."""
    keys = flatten(pinned).keys()
    return [axis for axis in lists if axis.path not in keys]


def checked(*layers: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of nested keys, each laid over those before it.

    Raises:
        ConfigError: A key or a value is wrong, the nearest valid key is named; or something was given as an object that
            no other process could find again.
        UnknownNameError: A name is not registered.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer)
    config = resolve(values)
    config.require_importable("a study's runs go by what any process finds again")
    if nameless := [name for name, digest in config.sources.items() if digest.startswith(UNIDENTIFIED)]:
        raise ConfigError(
            f"The {' and '.join(nameless)} of a run is an object that cannot be identified, so its record could never "
            "be told from another's. A study takes what a file defines: give its import path, package.module:attribute."
        )
    return config


def origin(number: int, points: Sequence[Mapping[str, Any]], values: Mapping[KeyPath, Any]) -> str:
    """Return where a study names a run: its point, if there are several, and its values of the grid."""
    said = []
    if len(points) > 1 or points[0]:
        said.append(f"point {number + 1} ({_written(flatten(points[number])) or 'no key'})")
    if values:
        said.append(f"the grid's {_written(values)}")
    return " with ".join(said) or "the base"


def _written(values: Mapping[KeyPath, Any]) -> str:
    return ", ".join(f"{'.'.join(path)} = {value!r}" for path, value in values.items())


def require_different(planned: Iterable[Planned], overrides: Mapping[str, Any]) -> None:
    """Refuse two runs with one hash: one of them was meant to be something else.

    Args:
        planned: The runs.
        overrides: Keys that were laid over all of them.

    Raises:
        ConfigError: Two runs have one hash; both are named.
    """
    seen: dict[str, str] = {}
    for plan in planned:
        if plan.config.hash in seen:
            laid = [".".join(path) for path in flatten(overrides) if path not in IMMATERIAL]
            remedy = f"{', '.join(laid)} was set for both: leave that out, or take" if laid else "Take"
            ignored = ", ".join(".".join(path) for path in IMMATERIAL)
            raise ConfigError(
                f"Two runs of the study are one and the same (hash {plan.config.hash}): {seen[plan.config.hash]}; and "
                f"{plan.origin}. {remedy} one of them out, or let them differ in a key that numbers depend on (they do "
                f"not on {ignored})."
            )
        seen[plan.config.hash] = plan.origin


def labels(
    configs: Sequence[RunConfig], *, seed: bool = True, apart_from: Collection[KeyPath] = frozenset()
) -> list[str]:
    """Return what each run is called: its methods, what tells it from the others, its seed.

    Args:
        configs: The runs of a study.
        seed: Whether to name the seed.
        apart_from: Keys that are not named.

    Returns:
        For example ``fedavg + group_norm, num_groups 8, lr 0.03, seed 1``.
    """
    flats = [flatten(config.to_dict()) for config in configs]
    keys = {key for flat in flats for key in flat if key not in IMMATERIAL and key[0] not in ("kind", "seed")}
    keys -= {("strategy", "name"), ("norm", "name"), ("learner", "name"), *apart_from}
    first = flats[0] if flats else {}
    varied = [
        key
        for key in dict.fromkeys(key for flat in flats for key in flat)
        if key in keys and any(flat.get(key) != first.get(key) for flat in flats)
    ]
    return [_label(config, flat, varied, seed) for config, flat in zip(configs, flats, strict=True)]


def _label(config: RunConfig, flat: Mapping[KeyPath, Any], varied: Iterable[KeyPath], seed: bool) -> str:
    told = [_method(config)]
    for path in varied:
        if path in flat:
            shown = in_words(flat[path])
            told.append(shown if path[-1] == "name" else f"{SHORT.get('.'.join(path), path[-1])} {shown}")
    return ", ".join(told + [f"seed {config.seed}"] * seed)


def _method(config: RunConfig) -> str:
    """Return a run's method: what trains, and its norm unless that is the strategy's own."""
    if config.kind == "continual":
        return f"{config.learner.name} + {config.norm.name}"
    if config.kind == "federated_continual":
        return f"{config.strategy.name} + {config.learner.name} + {config.norm.name}"
    own = config.norm.name == config.strategy.card.own_norm
    return config.strategy.name if own else f"{config.strategy.name} + {config.norm.name}"
