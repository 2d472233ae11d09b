"""Nested keys and values: read from TOML and from ``section.key=value``, laid over each other, flattened and nested."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fednorm.cards import Scalar
from fednorm.errors import ConfigError
from fednorm.limits import MOST_DEPTH, require_path, require_plain, shown

MOST_BYTES = 4 * 2**20
"""Of a configuration's or a study's file."""

_ENDLESS_KEY = re.compile(r"(?:[\w\"'-]+[ \t]*\.[ \t]*){64}")
"""Tables in tables that a reader of TOML takes minutes for: its time grows with the square of them."""

KeyPath = tuple[str, ...]
"""Where a value is: section and key."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file into nested dictionaries.

    Raises:
        ConfigError: The file is missing, is not TOML, or holds what no configuration key takes, e.g. a date.
    """
    require_path(path, "The configuration file")
    try:
        _require_regular(path)
        values = tomllib.loads(_readable(path, path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration file {path}: {error.strerror}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} nests tables or lists deeper than any configuration key does.") from error
    except ConfigError:
        raise
    except ValueError as error:  # not TOML, not UTF-8, an integer of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {str(error)[:300].rstrip('.')}.") from error
    require_plain(values, str(path), lines=True)
    return values


def _readable(path: Path, text: str) -> str:
    """Refuse a text over which the reader of TOML would sit for minutes."""
    if _ENDLESS_KEY.search(text):
        raise ConfigError(f"{path} has a key of more than 64 parts, deeper than any key.")
    return text


def _require_regular(path: Path) -> None:
    """Refuse a file that would be waited for, or read for minutes; one that is missing is named by its reader."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"The configuration file {path} is a device or a pipe. Give a TOML file.")
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes; no configuration has more than {MOST_BYTES:,}.")


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
            number = kind(text)
        except ValueError:
            continue
        if kind is int or math.isfinite(number) or not any(digit.isdigit() for digit in text):
            return number
    return text  # also digits by the thousand: an error can quote them, and infinity it could not


def override(assignment: str) -> dict[str, Any]:
    """Read one ``section.key=value`` into nested dictionaries.

    Raises:
        ConfigError: There is no ``=``.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes section.key=value; got {shown(assignment)}.")
    parts = tuple(key.strip().split("."))
    if len(parts) > MOST_DEPTH:
        raise ConfigError(f"--set takes section.key=value; {shown(key)} is deeper than any key.")
    nested = nest({parts: scalar(text)})
    require_plain(nested, "--set")
    return nested


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
