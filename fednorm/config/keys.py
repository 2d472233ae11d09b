"""Every key of the configuration as something to read: what it takes, its default, which runs use it, what it means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fednorm.config.resolve import FAMILY, TOP, VALUES
from fednorm.config.run import IMMATERIAL, SECTIONS, ModelChoice, RunConfig
from fednorm.config.schema import KINDS, Kind, expected, kinds_of
from fednorm.errors import canonical, unknown_name

SHORT = {"lr": "learning_rate"}
"""What people type for a key."""

WORDS: Mapping[Kind, str] = {
    "federated": "federated runs",
    "continual": "streams",
    "federated_continual": "federations of streams",
}
"""What the kinds of run are called."""


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        path: Its section and name, e.g. ``train.learning_rate``.
        takes: What values it takes, in words.
        default: Its value where nobody sets it.
        others: The kinds of run that have another default, with it.
        kinds: The kinds of run that have it.
        about: What it means.
        immaterial: Whether no number of a run depends on it.
    """

    path: str
    takes: str
    default: Any
    others: Mapping[Kind, Any]
    kinds: tuple[Kind, ...]
    about: str
    immaterial: bool

    @property
    def name(self) -> str:
        """Return the key within its section."""
        return self.path.rpartition(".")[2]

    @property
    def runs(self) -> str:
        """Return which runs use it, in words."""
        return words_of(self.kinds)

    def lines(self) -> Iterator[str]:
        """Yield the key as text: its name, default and runs; beneath it what it means."""
        default = f"{self.name} = {_written(self.default)}"
        if self.others:
            default += f" ({'; '.join(f'{WORDS[kind]}: {_written(value)}' for kind, value in self.others.items())})"
        yield f"{default}    [{self.runs}; {self.takes}]"
        yield f"    {self.about}{' No number depends on it.' if self.immaterial else ''}"


def words_of(kinds: Sequence[Kind]) -> str:
    """Return kinds of run in words: ``all runs``, ``federated runs, streams``."""
    return "all runs" if tuple(kinds) == KINDS else ", ".join(WORDS[kind] for kind in kinds)


def section_names() -> tuple[str, ...]:
    """Return the names of all sections, in the order of a record."""
    return tuple(dict.fromkeys(name for names in SECTIONS.values() for name in names))


def runs_of(section: str) -> tuple[Kind, ...]:
    """Return the kinds of run that have a section."""
    return tuple(kind for kind in KINDS if section in SECTIONS[kind])


def keys_of(section: str) -> list[Key]:
    """Return the keys of a section; of one that names a method, those that any method has."""
    if section in VALUES:
        fields = VALUES[section].model_fields
        return [_of_field(section, name, info) for name, info in fields.items()]
    family, kinds = FAMILY[section], runs_of(section)
    default = getattr(RunConfig.defaults(kinds[0]), section).name
    about = f"The {family.noun}: `fednorm list {family.plural}`, or the import path of your own."
    keys = [Key(f"{section}.name", "a name or an import path", default, {}, kinds, about, False)]
    if section == "model":
        general = {"width": "an integer, 0 or more", "activation": "a name", "weights": "a path"}
        for name, takes in {**general, "feature_norm": "true or false"}.items():
            value = getattr(ModelChoice, name)
            material = (section, name) not in IMMATERIAL
            keys.append(Key(f"model.{name}", takes, value, {}, kinds, _meanings(ModelChoice)[name], not material))
    return keys


def top_keys() -> list[Key]:
    """Return the keys that stand in no section."""
    defaults, meanings = RunConfig.defaults("federated"), _meanings(RunConfig)
    words = {str: "a name", int: "an integer", bool: "true or false"}
    values = {name: getattr(defaults, name) for name in TOP}
    return [Key(name, words[type(value)], value, {}, KINDS, meanings[name], False) for name, value in values.items()]


def find_key(path: str) -> Key:
    """Return a key by its path, e.g. ``train.learning_rate`` or ``train.lr``.

    Raises:
        UnknownNameError: The section has no such key.
    """
    section, _, name = canonical(path).rpartition(".")
    known = {key.name: key for key in (keys_of(section) if section else top_keys())}
    name = SHORT.get(name, name) if name not in known else name
    if name not in known:
        what = f"key of section {section}" if section else "key of the configuration"
        raise unknown_name(what, name, [*known, *SHORT], f"fednorm explain {section or 'config'}")
    return known[name]


def _of_field(section: str, name: str, info: FieldInfo) -> Key:
    kinds = tuple(kind for kind in runs_of(section) if kind in kinds_of(info))
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    defaults = {kind: extra.get(kind, info.default) for kind in kinds}
    default = defaults[kinds[0]]
    others = {kind: value for kind, value in defaults.items() if value != default}
    immaterial = (section, name) in IMMATERIAL
    return Key(f"{section}.{name}", _takes(info), default, others, kinds, info.description or "", immaterial)


def _takes(info: FieldInfo) -> str:
    if get_origin(info.annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(info.annotation)))}"
    plain = expected(info)
    within = expected(info, 1 if info.annotation is int else 0.5)
    return plain if within == plain else f"{plain}, {within}"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or '""'
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _meanings(cls: type) -> dict[str, str]:
    """Return what the attributes of a class are, as its docstring says."""
    _, _, listed = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("``", "").strip() for name, text in found}
