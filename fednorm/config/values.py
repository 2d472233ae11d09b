"""Nested keys and values: read from TOML and from ``section.key=value``, laid over each other, flattened and nested."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fednorm.cards import Scalar
from fednorm.errors import ConfigError

KeyPath = tuple[str, ...]
"""Where a value is: section and key."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file into nested dictionaries.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration file {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def merge(base: Mapping[str, Any], *over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the keys of each of ``over`` laid over it in turn, table by table."""
    merged = dict(base)
    for layer in over:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def scalar(text: str) -> Scalar:
    """Read a command-line value as TOML would: a boolean, an integer, a float, else the text itself."""
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def override(assignment: str) -> dict[str, Any]:
    """Read one ``section.key=value`` into nested dictionaries.

    Raises:
        ConfigError: There is no ``=``.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes section.key=value; got {assignment!r}.")
    return nest({tuple(key.strip().split(".")): scalar(text)})


def flatten(table: Mapping[str, Any], path: KeyPath = ()) -> dict[KeyPath, Any]:
    """Return the values at the end of nested keys by their paths."""
    flat: dict[KeyPath, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, (*path, key)) if isinstance(value, Mapping) else {(*path, key): value}
    return flat


def nest(flat: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """Return values by their paths as nested keys; :func:`flatten` the other way round."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        for key in reversed(path):
            value = {key: value}
        nested = merge(nested, value)
    return nested
