"""From nested keys to a run's configuration: names become cards, options are checked, defaults are laid below. Once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fednorm.cards import (
    ADAPTATIONS,
    DATA,
    LEARNERS,
    MODELS,
    NORMS,
    OPTIMIZERS,
    SCENARIOS,
    STRATEGIES,
    Card,
    Family,
    Option,
    Scalar,
    in_process,
    is_path,
    source_digest,
    spelled,
)
from fednorm.config.run import DEFAULT_NORM, MACHINE, SECTIONS, Choice, ModelChoice, RunConfig
from fednorm.config.schema import KINDS, Kind, Section, choose, nearest, unknown_key
from fednorm.config.sections import DataConfig, EvaluateConfig, GridConfig, RoundConfig, TrainConfig
from fednorm.config.values import merge
from fednorm.errors import ConfigError, UnknownNameError, canonical
from fednorm.limits import INTEGER, MOST_DEPTH, require_float, require_plain, shown

C = TypeVar("C", bound=Card)

FAMILY: Mapping[str, Family[Any]] = {
    "scenario": SCENARIOS,
    "model": MODELS,
    "norm": NORMS,
    "strategy": STRATEGIES,
    "learner": LEARNERS,
}
"""The sections that name a method."""

VALUES: Mapping[str, type[Section]] = {
    "data": DataConfig,
    "train": TrainConfig,
    "rounds": RoundConfig,
    "grid": GridConfig,
    "evaluate": EvaluateConfig,
}
"""The sections that are values."""

OF_EVERY_MODEL = ("width", "activation", "weights", "feature_norm")
"""Keys of section ``model`` that are no option of one model alone."""

LEADING: Mapping[Kind, tuple[str, ...]] = {
    "federated": ("strategy",),
    "continual": ("scenario",),
    "federated_continual": ("scenario", "strategy"),
}
"""The methods that bring defaults along for the rest of a run, a later one's over an earlier one's."""

TOP = ("kind", "seed", "threads", "workers", *MACHINE)


def resolve(values: Mapping[str, Any], *, only: Kind | None = None) -> RunConfig:
    """Build the configuration of a run, what its strategy or scenario brings along laid under what the user wrote.

    Args:
        values: Nested keys, as in a TOML file; ``kind`` is ``federated`` by default.
        only: The kind that it must be of, where the caller runs one kind only.

    Raises:
        UnknownNameError: A method is not registered.
        ConfigError: A key, an option or a value is wrong.
    """
    values = with_references(values) if isinstance(values, Mapping) else values
    require_plain(values, "The configuration")
    kind = values.get("kind", "federated")
    choose("kind", kind, (only,) if only else KINDS)
    known = (*TOP, *SECTIONS[kind])
    for key in values:
        if key not in known and key != "sources":
            raise unknown_key(key, key, known, _elsewhere(key))
    values = _for_own_data(kind, values)
    _require_words(kind, values)
    values = merge({"norm": {"name": DEFAULT_NORM}}, _brought_along(kind, values), _without_auto(values))
    sections: dict[str, Any] = {key: values[key] for key in TOP if key in values}
    if isinstance(sections.get("device"), str):
        sections["device"] = _device(sections["device"].strip().lower())
    for name in SECTIONS[kind]:
        table = values.get(name, {})
        sections[name] = VALUES[name].for_kind(kind, table) if name in VALUES else _choice(name, kind, table)
    # A benchmark's name becomes part of a folder's: one that nobody has ends here.
    sections["data"] = sections["data"].replace(name=_benchmark(sections["data"].name))
    sections["train"] = _with_optimizer(sections["train"])
    sections["evaluate"] = _with_adaptations(kind, sections["evaluate"])
    config = RunConfig(**sections)
    return _identified(config, values.get("sources", {}))


def _require_words(kind: Kind, values: Mapping[str, Any]) -> None:
    """Refuse a misspelt key or name before any method is imported, which takes seconds.

    Raises:
        ConfigError: A section is no table, or has a key that it does not have.
        UnknownNameError: There is no such method.
    """
    for section in SECTIONS[kind]:
        if section in VALUES:
            VALUES[section].require_keys(kind, values.get(section, {}))
    for section, family in REFERENCED.items():
        table = values.get(section, {}) if section in SECTIONS[kind] else {}
        name = table.get("name") if isinstance(table, Mapping) else None
        if isinstance(name, str) and name and not (section == "norm" and canonical(name) == "auto"):
            _require_name(kind, family, name)
    train = values.get("train", {})
    if isinstance(optimizer := train.get("optimizer"), str):
        OPTIMIZERS.require(optimizer)


def _require_name(kind: Kind, family: Family[Any], name: str) -> None:
    """Refuse a name that no method has; one that a key has is told as that.

    Raises:
        UnknownNameError: It is one of these.
    """
    asked = canonical(name)
    keys = [f"{part}.{asked}" for part in SECTIONS[kind] if part in VALUES and asked in VALUES[part].model_fields]
    keys += [f"model.{asked}"] if asked in OF_EVERY_MODEL else []
    try:
        family.require(name)
    except UnknownNameError as error:
        if not keys:
            raise
        raise UnknownNameError(
            f"There is no {family.noun} named {name!r}; it is a key of the configuration: --set {keys[0]}=VALUE. "
            f"fednorm explain {keys[0]} tells what it takes."
        ) from error


def _benchmark(name: str) -> str:
    """Return a benchmark's name as it is compared.

    Raises:
        UnknownNameError: There is no such benchmark.
    """
    name = spelled(name)
    DATA[name]
    return name


REFERENCED: Mapping[str, Family[Any]] = {**FAMILY, "data": DATA}
"""The sections whose ``name`` may be an object instead."""

_PLAIN = (str, bool, int, float, list)
"""What a TOML file has in place of a name, which is never a method."""


def with_references(table: Mapping[str, Any], *, lists: bool = False, depth: int = 0) -> dict[str, Any]:
    """Return nested keys with a reference in place of every method and every data that was given as an object.

    Args:
        table: The keys; tables of a study within them too.
        lists: Whether a list of names is several values to choose from, as in a study's grid.
        depth: Tables around it; beyond what any study has, nothing is looked for.

    Raises:
        FedNormError: An object is nothing of the section's family.
    """
    named = dict(table)
    for key, value in table.items() if depth <= MOST_DEPTH else ():
        if key in REFERENCED and isinstance(value, Mapping) and "name" in value:
            name, family = value["name"], REFERENCED[key]
            several = lists and isinstance(name, list)
            named[key] = {
                **value,
                "name": [_referenced(n, family) for n in name] if several else _referenced(name, family),
            }
        elif isinstance(value, Mapping):
            named[key] = with_references(value, lists=lists or key in ("grid", "search"), depth=depth + 1)
        elif key in ("points", "search") and isinstance(value, list):
            inner = key == "search"
            named[key] = [
                with_references(v, lists=inner, depth=depth + 1) if isinstance(v, Mapping) else v for v in value
            ]
    return named


def _referenced(given: Any, family: Family[Any]) -> Any:
    if given is None or isinstance(given, _PLAIN) or (isinstance(given, dict) and family is not DATA):
        return given
    return family.add(given)


def _for_own_data(kind: Kind, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with a scenario that takes any data, where a stream of somebody's own data names none.

    The default scenario is made of embedded data.
    """
    name = _name_in(values, "data")
    own = is_path(name) or canonical(name) in DATA.installed
    if "scenario" not in SECTIONS[kind] or not own or _name_in(values, "scenario"):
        return values
    return merge(values, {"scenario": {"name": "split"}})


def _device(name: str) -> str:
    """Return a device's name; for ``auto`` that of the one that this machine has."""
    if name != "auto":
        return name
    from fednorm.device import automatic  # imports PyTorch, which a configuration can do without

    return automatic()


def _with_optimizer(train: TrainConfig) -> TrainConfig:
    """Return the section with its optimizer's name as it is compared.

    Raises:
        UnknownNameError: There is no such optimizer.
        ConfigError: It has no momentum that could be set, or no such option.
    """
    card = OPTIMIZERS[train.optimizer]
    if train.momentum and not card.has_momentum:
        instead = "betas of its own" if card.adaptive else "none"
        raise ConfigError(f"train.momentum is SGD's; {train.optimizer} has {instead}. Leave it at 0.")
    for option, value in train.of_optimizer().items():
        if option not in card.declared:
            having = ", ".join(other.name for other in OPTIMIZERS if option in other.declared)
            raise ConfigError(
                f"train.{option} is an option of {having}, and optimizer {train.optimizer} does without; got "
                f"{value!r}. Leave it out, or set train.optimizer to one of these."
            )
    if train.nesterov and card.has_momentum and not train.momentum:
        raise ConfigError("train.nesterov looks ahead along the momentum, and train.momentum is 0. Set it, e.g. 0.9.")
    return train.replace(optimizer=spelled(train.optimizer))


def _with_adaptations(kind: Kind, evaluate: EvaluateConfig) -> EvaluateConfig:
    """Return the section with those options of its adaptations that are not at their default.

    Raises:
        UnknownNameError: There is no such adaptation.
        ConfigError: It has no such option, a value cannot be, one is there twice, or clients cannot do it.
    """
    if not evaluate.adaptation:
        return evaluate
    tables = []
    for given in evaluate.adaptation:
        card, options = ADAPTATIONS[given["name"]], {key: value for key, value in given.items() if key != "name"}
        checked = checked_options(card, "evaluate.adaptation", options)
        card.check(checked)
        if kind == "federated" and checked.get("reset") == "never":
            raise ConfigError(
                f"evaluate.adaptation, {card.name}: reset 'never' carries adaptation from one experience of a stream "
                "to the next; clients adapt apart, each on its own images. Take 'each' or 'batch'."
            )
        table = {"name": given["name"], **checked}
        if table in tables:
            raise ConfigError(f"evaluate.adaptation has {shown(table)} twice, defaults filled in. Leave one out.")
        tables.append(table)
    return evaluate.replace(adaptation=tuple(tables))


def _elsewhere(key: str) -> str:
    section, _, inner = str(key).partition(".")
    if inner and any(section in names for names in SECTIONS.values()):
        return (
            f" A name with a dot is a key in a table: in TOML {section}.{inner} without quotation marks, in Python "
            f'{{"{section}": {{"{inner}": ...}}}}.'
        )
    kinds = [kind for kind, names in SECTIONS.items() if key in names]
    return f" It is a section of {' and '.join(kinds)} runs." if kinds else ""


def _brought_along(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the leading methods, without sections whose name the user replaced.

    A width belongs to its model, and an option to its norm.
    """
    brought: dict[str, Any] = {}
    for section in LEADING[kind]:
        chosen = _choice(section, kind, {"name": _name_in(values, section)} if _name_in(values, section) else {})
        brought = merge(brought, getattr(chosen.card, "defaults", {}))

    def replaced(name: str) -> bool:
        own, theirs = _name_in(values, name), _name_in(brought, name)
        return bool(own and theirs and spelled(own) not in ("auto", spelled(theirs)))

    return {name: table for name, table in brought.items() if not replaced(name)}


def _name_in(values: Mapping[str, Any], section: str) -> str:
    table = values.get(section, {})
    return str(table.get("name", "")) if isinstance(table, Mapping) else ""


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without the norm's name where that is ``auto``, so that a default can take its place."""
    norm = values.get("norm", {})
    if isinstance(norm, Mapping) and canonical(str(norm.get("name", ""))) == "auto":
        return {**values, "norm": {key: value for key, value in norm.items() if key != "name"}}
    return dict(values)


# Methods --------------------------------------------------------------------------------------------------------------


def _choice(section: str, kind: Kind, table: Any) -> Choice[Any]:
    """Return the method that a section names.

    Raises:
        UnknownNameError: There is no such method.
        ConfigError: It is no table, there is no such option, or a value cannot be.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{section} is a table of keys; got {shown(table)}.")
    given = {key: value for key, value in table.items() if key not in ("name", "options")}
    beside = table.get("options", {})
    if not isinstance(beside, Mapping):
        raise ConfigError(f"{section}.options is a table of options; got {shown(beside)}.")
    given = {**beside, **given}
    family = FAMILY[section]
    name = spelled(str(table.get("name", _default_name(kind, section))))
    card = family[name]
    of_every = OF_EVERY_MODEL if section == "model" else ()
    general = {key: given.pop(key) for key in of_every if key in given}
    options = checked_options(card, section, given)
    card.check(options)
    if section == "model":
        return ModelChoice(name, family, options, **general)
    return Choice(name, family, options)


@cache
def _default_name(kind: Kind, section: str) -> str:
    default: Choice[Any] = getattr(RunConfig.defaults(kind), section)
    return default.name


def checked_options(card: Card, section: str, given: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the options that differ from their defaults, each in the type that the method declares, sorted.

    Raises:
        ConfigError: There is no such option, or it is of another type.
    """
    options: dict[str, Scalar] = {}
    for key, value in sorted(given.items()):
        if key not in card.declared:
            known = ", ".join(card.declared) or "none"
            raise ConfigError(
                f"There is no configuration key '{section}.{key}': {section} {card.name} has no option {key!r}."
                f"{nearest(key, card.declared)} Its options: {known}."
            )
        typed = _typed(card, f"{section}.{key}", value, card.declared[key])
        if not _same(typed, card.declared[key].default):
            options[key] = typed
    return options


_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def _typed(card: Card, full: str, value: Any, option: Option) -> Any:
    """Return an option's value in the type that its annotation names.

    The method's own words come first where it refuses the value: they say the range too.
    """
    if option.type is Any:
        return value
    if isinstance(value, float):
        require_float(full, value)
    if isinstance(value, int) and not -INTEGER <= value < INTEGER:
        raise ConfigError(f"{full} is a number of at most 64 bits; got {shown(value)}.")
    try:
        adapter = TypeAdapter(option.type, config=ConfigDict(strict=True, allow_inf_nan=False))
        return adapter.validate_python(value)
    except ValidationError:
        card.check({option.name: value})
        wanted = _WORDS.get(option.type, _choices(option.type) or str(option.type).removeprefix("typing."))
        raise ConfigError(f"{full} must be {wanted}; got {shown(value)}. Its default is {option.default!r}.") from None


def _choices(annotation: Any) -> str:
    literal = getattr(annotation, "__origin__", None) is Literal
    return f"one of {', '.join(map(str, annotation.__args__))}" if literal else ""


def _same(value: Any, default: Any) -> bool:
    """Return whether two options are the same; ``True`` is not 1, though Python finds them equal."""
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


# Strangers' code ------------------------------------------------------------------------------------------------------


def _identified(config: RunConfig, expected: Any) -> RunConfig:
    """Return the configuration with a digest of every stranger's source, and of the weights that are given.

    Args:
        config: The configuration.
        expected: The digests that the record it was read from has.

    Raises:
        ConfigError: A source has changed since.
    """
    names = config.references
    sources = {
        section: source_digest(name, REFERENCED[section][name])
        for section, name in names.items()
        # Data that was given as an object is identified by its name, which ends with a digest of it.
        if REFERENCED[section].is_foreign(name) and not (section == "data" and in_process(name))
    }
    if config.model.weights:
        sources["weights"] = config.model.card.weights_digest(config.model.weights)
    for name, value in (expected if isinstance(expected, Mapping) else {}).items():
        if sources.get(name, value) != value:
            what = f"source of {name} {names[name]!r}" if name in names else "file of model.weights"
            raise ConfigError(
                f"The {what} is not what it was when this configuration was made "
                f"({value} then, {sources[name]} now). Run it under a new seed or name, or put it back as it was."
            )
    if not sources:
        return config
    from dataclasses import replace

    return replace(config, sources=sources)
