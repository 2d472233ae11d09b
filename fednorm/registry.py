"""Names to strategies and scenarios: the one module of fednorm that imports those packages, and only when asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fednorm.config import RunConfig, Scalar, choose, config_from_dict, merge
from fednorm.continual_config import ContinualConfig, LearnerConfig, continual_config_from_dict
from fednorm.data.benchmarks import BENCHMARKS
from fednorm.errors import ConfigError, canonical, unknown_name
from fednorm.limits import require_plain
from fednorm.models import MODELS
from fednorm.norms import make_norm
from fednorm.options import flag, number

if TYPE_CHECKING:
    from fednorm.continual.learner import LearnerOptions, LearnerSpec
    from fednorm.continual.spec import ScenarioSpec
    from fednorm.federated.spec import StrategySpec
    from fednorm.federated.strategy import NormStrategy

API = 1


def _package(name: str) -> ModuleType:
    package = import_module(name)
    if getattr(package, "FEDNORM_API", None) != API:
        raise ConfigError(
            f"The package {name!r} that Python found at {package.__file__} is not fednorm's. A folder of that name "
            "in the working directory hides it: run the console script 'fednorm', or 'python -P', or rename the folder."
        )
    return package


def strategy_names() -> tuple[str, ...]:
    """Return the names of all strategies."""
    return cast(tuple[str, ...], _package("strategies").STRATEGIES)


def scenario_names() -> tuple[str, ...]:
    """Return the names of all scenarios."""
    return cast(tuple[str, ...], _package("scenarios").SCENARIOS)


def strategy_spec(name: str) -> StrategySpec:
    """Return the identity card of a strategy.

    Raises:
        UnknownNameError: There is no such strategy.
    """
    name = canonical(name)
    if name not in strategy_names():
        raise unknown_name("strategy", name, strategy_names())
    return cast("StrategySpec", import_module(f"strategies.{name}").SPEC)


def scenario_spec(name: str) -> ScenarioSpec:
    """Return the identity card of a scenario.

    Raises:
        UnknownNameError: There is no such scenario.
    """
    name = canonical(name)
    if name not in scenario_names():
        raise unknown_name("scenario", name, scenario_names())
    return cast("ScenarioSpec", import_module(f"scenarios.{name}").SPEC)


def learner_names() -> tuple[str, ...]:
    """Return the names of all learners."""
    _package("scenarios")
    return cast(tuple[str, ...], import_module("scenarios.learners").LEARNERS)


def learner_spec(name: str) -> LearnerSpec:
    """Return the identity card of a learner.

    Raises:
        UnknownNameError: There is no such learner.
    """
    name = canonical(name)
    if name not in learner_names():
        raise unknown_name("learner", name, learner_names())
    return cast("LearnerSpec", import_module(f"scenarios.learners.{name}").SPEC)


def resolve(values: Mapping[str, Any]) -> RunConfig | ContinualConfig:
    """Build the configuration of a run of either kind; ``kind`` says which, ``federated`` by default.

    Raises:
        UnknownNameError: A name is not registered.
        ConfigError: A key or a value is wrong.
    """
    require_plain(values, "The configuration")
    kind = values.get("kind", "federated")
    choose("kind", kind, ("federated", "continual"))
    return resolve_continual(values) if kind == "continual" else resolve_config(values)


def resolve_continual(values: Mapping[str, Any]) -> ContinualConfig:
    """Build a continual run's configuration, the scenario's own defaults laid under what the user wrote.

    Raises:
        UnknownNameError: The scenario, the learner or the norm is not registered.
        ConfigError: A key or a value is wrong.
    """
    require_plain(values, "The configuration")
    values = _without_auto(values)
    written = continual_config_from_dict(values)
    scenario, learner = scenario_spec(written.scenario.name), learner_spec(written.learner.name)
    defaults = merge({"kind": "continual", "norm": {"name": "batch_norm"}}, _fitting(scenario.defaults, values))
    config = continual_config_from_dict(merge(defaults, values))
    _require_data(config.data.name)
    _require_model(config.model.name)
    norm_defaults = dataclasses.asdict(make_norm(config.norm.name))
    return dataclasses.replace(
        config,
        norm=dataclasses.replace(config.norm, options=_beside(norm_defaults, config.norm.options)),
        scenario=dataclasses.replace(config.scenario, options=_beside(scenario.options, config.scenario.options)),
        learner=dataclasses.replace(config.learner, options=_beside(learner.options, config.learner.options)),
    )


def _fitting(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default sections, without those whose name the user replaced: a width belongs to its model."""

    def replaced(section: str) -> bool:
        name, default = _name_in(values, section), _name_in(defaults, section)
        return bool(name and default and canonical(name) != canonical(default))

    return {section: table for section, table in defaults.items() if not replaced(section)}


def _name_in(values: Mapping[str, Any], section: str) -> str:
    table = values.get(section, {})
    return str(table.get("name", "")) if isinstance(table, Mapping) else ""


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without the norm's name where that is ``auto``, so that a default can take its place."""
    norm = values.get("norm", {})
    if isinstance(norm, Mapping) and canonical(str(norm.get("name", ""))) == "auto":
        return {**values, "norm": {key: value for key, value in norm.items() if key != "name"}}
    return dict(values)


def learner_options(config: LearnerConfig) -> LearnerOptions:
    """Return the options of a run's learner.

    Raises:
        ConfigError: There is no such option, or its value is of the wrong type or out of range.
    """
    spec = learner_spec(config.name)
    for key in config.options:
        if key not in spec.options:
            raise ConfigError(
                f"learner {spec.name} has no option {key!r}. Its options: {', '.join(spec.options) or 'none'}."
            )
    return spec.make.Options(**cast(dict[str, Any], dict(config.options)))


def resolve_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a run's configuration, the strategy's own defaults laid under what the user wrote.

    Raises:
        UnknownNameError: The strategy is not registered.
        ConfigError: A key or a value is wrong.
    """
    require_plain(values, "The configuration")
    chosen = values.get("strategy", {})
    name = chosen.get("name", "fedavg") if isinstance(chosen, Mapping) else str(chosen)
    spec = strategy_spec(str(name))
    values = _without_auto(values)
    defaults = merge({"norm": {"name": "batch_norm"}}, spec.defaults)
    config = config_from_dict(merge(defaults, values))
    _require_data(config.data.name)
    _require_model(config.model.name)
    norm_defaults = dataclasses.asdict(make_norm(config.norm.name))
    return dataclasses.replace(
        config,
        norm=dataclasses.replace(config.norm, options=_beside(norm_defaults, config.norm.options)),
        strategy=dataclasses.replace(config.strategy, options=_beside(spec.options, config.strategy.options)),
    )


def _require_data(name: str) -> None:
    """Refuse a benchmark that is none; its name becomes part of a folder's."""
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)


def _require_model(name: str) -> None:
    """Refuse a model that is none, before a study has begun."""
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)


def _beside(defaults: Mapping[str, Any], options: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the options that differ from their defaults, numbers in the type of the default."""
    typed = {
        key: float(value) if isinstance(defaults.get(key), float) and type(value) is int else value
        for key, value in options.items()
    }
    return {key: value for key, value in typed.items() if not _same(value, defaults.get(key, ...))}


def _same(value: Any, default: Any) -> bool:
    """Return whether two options are the same; ``True`` is not 1, though Python finds them equal."""
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def make_strategy(config: RunConfig, model: nn.Module, *, num_nodes: int) -> NormStrategy:
    """Return a run's strategy for its model.

    Args:
        config: The run's configuration.
        model: The run's model.
        num_nodes: Nodes to wait for before the first round.

    Raises:
        ConfigError: The strategy has no such option, or its value is of the wrong type or out of range.
        RoleError: The strategy would do nothing on this model.
    """
    spec = strategy_spec(config.strategy.name)
    for key, value in config.strategy.options.items():
        if key not in spec.options:
            raise ConfigError(
                f"strategy {spec.name} has no option {key!r}. Its options: {', '.join(spec.options) or 'none'}."
            )
        if isinstance(spec.options[key], bool):
            flag("strategy", key, value)
        elif isinstance(spec.options[key], int | float):
            number("strategy", key, value)
    limit = config.rounds.max_update_norm
    return spec.make(
        model,
        **({"max_update_norm": limit} if limit else {}),  # a stranger's strategy may not know it
        fraction=config.rounds.fraction,
        weighting=config.rounds.weighting,
        seed=config.seed,
        min_nodes=num_nodes,
        **cast(dict[str, Any], dict(config.strategy.options)),
    )
