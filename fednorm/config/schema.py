"""How a section of the configuration is declared: pydantic checks it, and every mistake is a sentence of ours.

    class TrainConfig(Section, name="train"):
        learning_rate: float = key(0.01, "Of the optimizer, per step.", gt=0, continual=0.03)

Types are strict: no text is read as a number, and ``true`` is none. A key says which kinds of run have it, and may have
another default in a continual run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fednorm.errors import ConfigError
from fednorm.limits import INTEGER, require_float, shown

Kind = Literal["federated", "continual", "federated_continual"]
KINDS: tuple[Kind, ...] = ("federated", "continual", "federated_continual")


def key(
    default: Any,
    about: str,
    *,
    kinds: tuple[Kind, ...] = KINDS,
    continual: Any = ...,
    instead: Mapping[Kind, str] | None = None,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> Any:
    """Declare a key of a section.

    Args:
        default: Its value where nobody sets it.
        about: What it means, in a sentence or a few, with its unit.
        kinds: The kinds of run that have it.
        continual: Its default in a continual run, where that is another.
        instead: The key that kinds of run without it have in its place.
        gt: What it must be greater than.
        ge: What it must be at least.
        lt: What it must be less than.
        le: What it may be at most.
    """
    extra: dict[str, Any] = {"kinds": list(kinds)}
    if continual is not ...:
        extra["continual"] = continual
    if instead:
        extra["instead"] = dict(instead)
    return Field(default, description=about, json_schema_extra=extra, gt=gt, ge=ge, lt=lt, le=le)


def _names(value: Any) -> Any:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("a list of names")
    return tuple(item.strip() for item in items if item.strip())


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""Names: a list of them, or one string with commas between."""


class Section(BaseModel):
    """A frozen table of the configuration."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    path: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.path = name

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_sentence(type(self), error.errors()[0])) from None
        for name, value in self.__dict__.items():
            if isinstance(value, int | float):
                _require_size(f"{self.path}.{name}", value)

    @classmethod
    def keys(cls, kind: Kind) -> tuple[str, ...]:
        """Return the keys that a kind of run has, in order."""
        return _keys(cls, kind)

    @classmethod
    def for_kind(cls, kind: Kind, values: Any) -> Self:
        """Build the section of a kind of run.

        Args:
            kind: The kind.
            values: The keys that somebody set.

        Raises:
            ConfigError: It is no table, a key is unknown to that kind, or a value cannot be.
        """
        cls.require_keys(kind, values)
        return cls(**{**_defaults(cls, kind), **values})

    @classmethod
    def require_keys(cls, kind: Kind, values: Any) -> None:
        """Refuse what is no table, or has a key that a kind of run does not have.

        Raises:
            ConfigError: It is one of these.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.path} is a table of keys; got {shown(values)}.")
        known = cls.keys(kind)
        for name in values:
            if name not in known:
                raise unknown_key(f"{cls.path}.{name}", name, known, _elsewhere(cls, name, kind))

    def to_dict(self, kind: Kind) -> dict[str, Any]:
        """Return the keys that a kind of run has, as plain values for JSON."""
        return self.model_dump(mode="json", include=set(self.keys(kind)))

    def replace(self, **changes: Any) -> Self:
        """Return this section with some keys changed, checked anew; itself where nothing is."""
        if all(type(value) is type(own := getattr(self, name)) and value == own for name, value in changes.items()):
            return self
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


@cache  # a study's thousands of runs are resolved one by one, and a section's keys never change
def _keys(section: type[Section], kind: Kind) -> tuple[str, ...]:
    return tuple(name for name, info in section.model_fields.items() if kind in kinds_of(info))


@cache
def _defaults(section: type[Section], kind: Kind) -> Mapping[str, Any]:
    """Return the keys whose default in a kind of run is another, with it."""
    other = {name: _extra(info) for name, info in section.model_fields.items()}
    return {name: extra[kind] for name, extra in other.items() if kind in extra}


def _require_size(full: str, value: Any) -> None:
    """Refuse a number that no network computes with, and no index counts."""
    if isinstance(value, float):
        require_float(full, value)
    elif isinstance(value, int) and not -INTEGER <= value < INTEGER:
        raise ConfigError(f"{full} has at most 64 bits; got {shown(value)}.")


def kinds_of(info: FieldInfo) -> list[str]:
    """Return the kinds of run that have a key."""
    return list(_extra(info).get("kinds", KINDS))


def _extra(info: FieldInfo) -> dict[str, Any]:
    return dict(info.json_schema_extra) if isinstance(info.json_schema_extra, dict) else {}


def unknown_key(full: str, word: str, known: Iterable[str], hint: str = "") -> ConfigError:
    """Return the error for a key that nobody has."""
    known = tuple(known)
    return ConfigError(
        f"There is no configuration key {shown(full)}.{hint}{nearest(word, known)} Known here: {', '.join(known)}."
    )


def _elsewhere(cls: type[Section], name: str, kind: Kind) -> str:
    info = cls.model_fields.get(name)
    if info is None:
        return ""
    instead = _extra(info).get("instead", {}).get(kind)
    in_its_place = f" A {kind} run has {instead} in its place." if instead else ""
    return f" It is a key of {' and '.join(kinds_of(info))} runs.{in_its_place}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question that offers the valid word nearest to a wrong one; empty where none is near."""
    near = difflib.get_close_matches(str(word)[:80], list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def choose(full: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ConfigError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"{full} must be one of {', '.join(choices)}; got {shown(value)}.{nearest(str(value), choices)}"
        )


# Sentences ------------------------------------------------------------------------------------------------------------

_EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def _sentence(cls: type[Section], mistake: ErrorDetails) -> str:
    """Return what is wrong with a section: the key, what it takes, what came, what it means."""
    raised = mistake.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        return str(raised)
    name = str(mistake["loc"][0]) if mistake["loc"] else ""
    info = cls.model_fields.get(name)
    if info is None:
        return str(unknown_key(f"{cls.path}.{name}", name, cls.model_fields))
    full, value = f"{cls.path}.{name}" if cls.path else name, mistake["input"]
    if (choices := _choices(info)) and isinstance(value, str):
        return f"{full} must be one of {', '.join(choices)}; got {shown(value)}.{nearest(value, choices)}"
    return f"{full} must be {expected(info, value)}; got {shown(value)}. It is: {info.description}"


def _choices(info: FieldInfo) -> tuple[str, ...]:
    return get_args(info.annotation) if get_origin(info.annotation) is Literal else ()


def expected(info: FieldInfo, value: Any = None) -> str:
    """Return what a key takes, in words: its type where the value is of another, else its range."""
    if info.annotation is not None and get_origin(info.annotation) is tuple:
        return "a list of names" if get_args(info.annotation)[0] is str else "a list of names and tables"
    wanted: Any = str if _choices(info) else info.annotation
    if get_origin(wanted) is UnionType:  # int | float
        wanted = float
    numeric = isinstance(value, int | float) and not isinstance(value, bool) and wanted in (int, float)
    words = _EXPECTED.get(wanted, "a number") if isinstance(wanted, type) else "a number"
    if not numeric or (wanted is int and isinstance(value, float)) or not _is_finite(value):
        return words
    return _range(info) or words


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _range(info: FieldInfo) -> str:
    bounds = {name: getattr(m, name) for m in info.metadata for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}
    low = next((f"{sign}{bounds[name]:g}" for name, sign in (("gt", "("), ("ge", "[")) if name in bounds), "")
    high = next((f"{bounds[name]:g}{sign}" for name, sign in (("lt", ")"), ("le", "]")) if name in bounds), "")
    if low and high:
        return f"in {low}, {high}"
    if low:
        return f"greater than {low[1:]}" if low[0] == "(" else "0 or more" if low == "[0" else f"at least {low[1:]}"
    return f"less than {high[:-1]}" if high.endswith(")") else f"at most {high[:-1]}" if high else ""
