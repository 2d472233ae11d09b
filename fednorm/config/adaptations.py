"""Under which test-time adaptations a network is evaluated, as ``evaluate.adaptation`` has it.

A method's name, or a table of its name and its options; a list of these. An option whose value is a list stands for
each of its values in turn, and several such options for every combination:

    adaptation = ["bn_alpha", { name = "tent", batch_size = [1, 32], order = ["shuffled", "class_sorted"] }]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Annotated, Any

from pydantic import BeforeValidator

from fednorm.cards import spelled
from fednorm.errors import ConfigError
from fednorm.limits import shown

MOST = 200
"""Adaptations of a run: each goes through all test images."""


def _tables(value: Any) -> tuple[dict[str, Any], ...]:
    """Return a table of single values for each adaptation.

    Raises:
        ConfigError: It is something else, or too many.
    """
    if isinstance(value, str):
        value = [name for name in value.split(",") if name.strip()]
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list | tuple):
        raise _wrong(value)
    tables: list[dict[str, Any]] = []
    for item in items:
        tables += _each(item)
        if len(tables) > MOST:
            raise _too_many()
    return tuple(tables)


def _each(item: Any) -> Iterator[dict[str, Any]]:
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
        raise _wrong(item)
    name = item.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f"evaluate.adaptation: a table has the name of its method; got {shown(dict(item))}. E.g. "
            '{ name = "tent", batch_size = 32 }; `fednorm list adaptations` tells the names.'
        )
    options = {key: value for key, value in item.items() if key != "name"}
    values = {key: value if isinstance(value, list | tuple) else [value] for key, value in options.items()}
    for key, several in values.items():
        if not several or not all(isinstance(value, bool | int | float | str) for value in several):
            raise ConfigError(
                f"evaluate.adaptation, {name}: {key} takes a value, or a list of values to try; got "
                f"{shown(options[key])}."
            )
    if prod(map(len, values.values())) > MOST:
        raise _too_many()
    for chosen in product(*values.values()):
        yield {"name": spelled(name), **dict(zip(values, chosen, strict=True))}


def _wrong(value: Any) -> ConfigError:
    return ConfigError(
        "evaluate.adaptation takes methods of test-time adaptation: names with commas between, or a list of names and "
        f'of tables {{ name = "tent", batch_size = 32 }}; got {shown(value)}.'
    )


def _too_many() -> ConfigError:
    return ConfigError(
        f"evaluate.adaptation names more than {MOST} adaptations, lists of options multiplied; each goes through all "
        "test images. Name fewer."
    )


def in_words(value: Any) -> str:
    """Return a value of the configuration as text: of tables, the names that they have, each once."""
    if not isinstance(value, list | tuple):
        return f"{value:g}" if type(value) is float else str(value)
    names = (str(item.get("name")) if isinstance(item, Mapping) else str(item) for item in value)
    return ",".join(dict.fromkeys(names))


Adaptations = Annotated[tuple[dict[str, Any], ...], BeforeValidator(_tables)]
"""A table for each adaptation: its name, and options beside it."""
