"""The tables of a study's file: what may stand in them, and the sentence that a mistake gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fednorm.config import flatten, nearest, nest
from fednorm.errors import ConfigError, canonical
from fednorm.limits import shown
from fednorm.study.grid import checked

Table = Mapping[str, Any]

SECTIONS = ("study", "base", "points", "grid", "search", "select", "paper")
ABOUT = ("title", "about", "baseline")
PAPER: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "match": (dict, "a table of configuration keys"),
    "score": (str, "a dotted key of a result's 'final'"),
    "value": ((int, float), "a number"),
    "source": (str, "where in the paper it stands"),
    "std": ((int, float), "a number"),
}
"""Keys of a number of a paper, the last of them optional, and what they hold."""


def require_sections(document: Table, where: str) -> None:
    """Refuse a document that is no study.

    Args:
        document: The tables of the file.
        where: What the file is called in an error.

    Raises:
        ConfigError: A table is unknown, missing, empty or no table.
    """
    for key in document:
        if key not in SECTIONS:
            raise ConfigError(
                f"{where} has a table [{key}] that no study has.{nearest(key, SECTIONS)} Tables of a study: "
                f"{', '.join(SECTIONS)}."
            )
    if "base" not in document:
        raise ConfigError(
            f"{where} must have a [base] table of the keys that all runs share, and may have others "
            f"({', '.join(SECTIONS)}); got {', '.join(document) or 'an empty file'}."
        )
    for key in ("study", "base", "grid", "search", "select"):
        if not isinstance(document.get(key, {}), Mapping):
            raise ConfigError(f"{where}: [{key}] is a table of keys; got {key} = {shown(document[key])}.")
        if key in ("grid", "search") and key in document and not flatten(document[key]):
            raise ConfigError(f"{where}: [{key}] is empty. Give it a list, e.g. seed = [1, 2, 3], or leave it out.")
    for key, what in (("points", "one a method"), ("paper", "one a number")):
        tables = document.get(key, [{}])
        full = isinstance(tables, list) and tables and all(isinstance(table, Mapping) for table in tables)
        if not full:
            raise ConfigError(f"{where}: [[{key}]] are tables of keys, {what}; got {shown(tables)}.")


def about_study(table: Table, base: Table, where: str) -> dict[str, Any]:
    """Return the keys of ``[study]``.

    Args:
        table: The table.
        base: The table ``[base]``.
        where: What the file is called in an error.

    Raises:
        ConfigError: A key is unknown or of the wrong type.
    """
    for key, value in table.items():
        if key not in ABOUT:
            raise ConfigError(
                f"{where}: [study] has no key {shown(key)}.{nearest(key, ABOUT)} Known: {', '.join(ABOUT)}."
            )
        if not isinstance(value, Mapping if key == "baseline" else str):
            raise ConfigError(
                f"{where}: study.{key} is a {'table of keys' if key == 'baseline' else 'text'}; got {shown(value)}."
            )
    if "baseline" not in table:
        return dict(table)
    return {**table, "baseline": _part(table["baseline"], base)}


def _part(keys: Table, base: Table) -> dict[str, Any]:
    """Return part of a configuration with names in the registries' spelling, its keys checked."""
    checked({"kind": base.get("kind", "federated")}, keys)
    spelled = {
        path: canonical(value) if path[-1] == "name" and isinstance(value, str) else value
        for path, value in flatten(keys).items()
    }
    return nest(spelled)


def paper_number(entry: Table, number: int, base: Table, where: str) -> dict[str, Any]:
    """Return a number of a paper as the manifest has it.

    Args:
        entry: A table of ``[[paper]]``.
        number: Which one, from 1.
        base: The table ``[base]``.
        where: What the file is called in an error.

    Raises:
        ConfigError: A key is unknown, missing or of the wrong type.
    """
    place = f"{where}: number {number} of [[paper]]"
    for key in entry:
        if key not in PAPER:
            raise ConfigError(f"{place} has no key {shown(key)}.{nearest(key, PAPER)} Known: {', '.join(PAPER)}.")
    for key, (type_, what) in PAPER.items():
        if key == "std" and key not in entry:
            continue
        value = entry.get(key)
        if not isinstance(value, type_) or isinstance(value, bool):
            raise ConfigError(f"{place} needs {key}, {what}; got {'nothing' if value is None else shown(value)}.")
    return {**entry, "match": _part(entry["match"], base)}
