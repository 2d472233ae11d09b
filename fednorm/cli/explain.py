"""``fednorm explain`` of the configuration: a section, a key; and the names that it knows, without any import."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from rich.padding import Padding
from rich.text import Text

from fednorm.cards import FAMILIES, is_path
from fednorm.cli.console import out, print_json
from fednorm.config import SECTION_FAMILIES, SECTION_VALUES
from fednorm.config.keys import Key, find_key, keys_of, runs_of, section_names, top_keys, words_of
from fednorm.config.resolve import TOP
from fednorm.errors import canonical, unknown_name


def explained(name: str, *, as_json: bool) -> bool:
    """Explain a section or a key of the configuration; return whether the name is one.

    Raises:
        UnknownNameError: The section has no such key, or nothing at all has that name.
    """
    asked = canonical(name)
    section, dot, _ = asked.partition(".")
    if asked in section_names():
        _print(_section(asked), as_json)
    elif asked in TOP or (dot and section in section_names() and ":" not in asked):
        _print(_one(find_key(asked)), as_json)
    elif asked == "config":
        _print(_all(), as_json)
    elif keys := _keys_called(asked):
        _print(_several(keys), as_json)
    else:
        _require_known(name)
        return False
    return True


def _keys_called(name: str) -> list[Key]:
    """Return the keys of any section that have a name, which no method has."""
    if any(name in family.names for family in FAMILIES.values()):
        return []
    return [key for section in section_names() for key in keys_of(section) if key.name == name]


def _several(keys: Sequence[Key]) -> dict[str, Any]:
    """Return what is told of keys of one name: of one alone as if its section had been named."""
    told = [_one(key) for key in keys]
    if len(told) == 1:
        return told[0]
    return {
        "what": "keys of the configuration",
        "name": keys[0].name,
        "keys": [{key: value for key, value in one.items() if key != "text"} for one in told],
        "text": "\n\n".join(one["text"] for one in told),
    }


def _require_known(name: str) -> None:
    """Refuse a misspelt name before what has it is imported."""
    if is_path(name) or any(canonical(name) in family.names for family in FAMILIES.values()):
        return
    known = [*section_names(), *TOP, *(known for family in FAMILIES.values() for known in family.names)]
    raise unknown_name(
        "norm, strategy, scenario, learner, model, benchmark, optimizer, adaptation or section of the configuration",
        canonical(name),
        known,
        "fednorm list --all",
    )


def _print(document: dict[str, Any], as_json: bool) -> None:
    text = document.pop("text")
    if as_json:
        print_json(document)
    else:
        for line in text.split("\n"):  # between words, and what is indented stays so
            shown = line.lstrip(" ")
            out().print(Padding(Text(shown or " "), (0, 0, 0, len(line) - len(shown)), expand=False))


def _section(name: str) -> dict[str, Any]:
    keys = keys_of(name)
    if name in SECTION_VALUES:
        about = inspect.getdoc(SECTION_VALUES[name]) or ""
    else:
        family = SECTION_FAMILIES[name]
        about = (
            f"Which {family.noun}. Its options stand beside its name, {name}.OPTION: `fednorm explain NAME` tells "
            f"them, `fednorm list {family.plural}` the names."
        )
    head = f"{name} (section of the configuration, of {words_of(runs_of(name))})"
    text = [head, "", about, "", *(line for key in keys for line in key.lines()), "", _how(keys[0])]
    return {
        "what": "section of the configuration",
        "name": name,
        "options": {key.name: key.default for key in keys},
        "keys": [dataclasses.asdict(key) for key in keys],
        "about": "\n".join([about, "", *(f"{key.name} ({', '.join(key.kinds)}): {key.about}" for key in keys)]),
        "text": "\n".join(text),
    }


def _one(key: Key) -> dict[str, Any]:
    text = [f"{key.path} (key of the configuration)", "", *key.lines(), "", _how(key)]
    return {"what": "key of the configuration", "name": key.path, **dataclasses.asdict(key), "text": "\n".join(text)}


def _all() -> dict[str, Any]:
    """Return the sections, a line each, and the keys that stand in none."""
    told = [
        f"{name}: {words_of(runs_of(name))}; {', '.join(key.name for key in keys_of(name))}" for name in section_names()
    ]
    text = ["The configuration: fednorm explain SECTION, fednorm explain SECTION.KEY", "", *told, ""]
    text += [line for key in top_keys() for line in key.lines()]
    return {"what": "configuration", "name": "config", "sections": list(section_names()), "text": "\n".join(text)}


def _how(key: Key) -> str:
    value = key.default if key.default not in ("", (), None) else "VALUE"
    section, _, name = key.path.rpartition(".")
    in_file = f"[{section}] {name} = ..." if section else f"{name} = ..."
    written = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
    return f"Set it with --set {key.path}={written}, or in a file (--config FILE.toml): {in_file}"
