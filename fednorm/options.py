"""Checks of a method's options: each raises a ConfigError that names the option, what it takes and what came.

Options reach a method from TOML, from the command line and from Python, so a check also covers the type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fednorm.errors import ConfigError

LARGEST = 3.4e38
"""What a number may be at most to be one in single precision, in which networks compute: beyond it is infinity."""


def number(method: str, option: str, value: Any, *, above: float = -math.inf, at_most: float = math.inf) -> None:
    """Require a finite real number in (``above``, ``at_most``], within what single precision holds.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        raise ConfigError(f"{method}.{option} must be a finite number; got {value!r}.")
    if abs(value) > LARGEST:  # compared, not converted: an integer may be beyond any float
        raise ConfigError(f"{method}.{option} must be at most {LARGEST:g}, which is what float32 holds; got {value!r}.")
    if not above < value <= at_most:
        upper = f" and at most {at_most:g}" if math.isfinite(at_most) else ""
        raise ConfigError(f"{method}.{option} must be greater than {above:g}{upper}; got {value!r}.")


def whole(method: str, option: str, value: Any, *, at_least: int) -> None:
    """Require an integer of ``at_least`` or more.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{method}.{option} must be an integer of {at_least} or more; got {value!r}.")


def flag(method: str, option: str, value: Any) -> None:
    """Require a boolean.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{method}.{option} must be true or false; got {value!r}.")


def one_of(method: str, option: str, value: Any, choices: Iterable[str]) -> None:
    """Require one of the strings ``choices``.

    Raises:
        ConfigError: It is something else.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{method}.{option} must be one of {', '.join(choices)}; got {value!r}.")
