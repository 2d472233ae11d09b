"""Checks of a method's options: each raises a ConfigError that names the option, what it takes and what came.

Options reach a method from TOML, from the command line and from Python, so a check also covers the type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fednorm.errors import ConfigError
from fednorm.limits import INTEGER, require_float, shown


def number(method: str, option: str, value: Any, *, above: float = -math.inf, at_most: float = math.inf) -> None:
    """Require a finite real number in (``above``, ``at_most``], within what single precision holds.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{method}.{option} must be a finite number; got {shown(value)}.")
    if isinstance(value, int) and not -INTEGER <= value < INTEGER:
        raise ConfigError(f"{method}.{option} must be a number of at most 64 bits; got {shown(value)}.")
    require_float(f"{method}.{option}", value)
    if not above < value <= at_most:
        limits = [
            *([f"greater than {above:g}"] if math.isfinite(above) else []),
            *([f"at most {at_most:g}"] if math.isfinite(at_most) else []),
        ]
        raise ConfigError(f"{method}.{option} must be {' and '.join(limits)}; got {shown(value)}.")


def whole(method: str, option: str, value: Any, *, at_least: int) -> None:
    """Require an integer of ``at_least`` or more.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < INTEGER:
        raise ConfigError(f"{method}.{option} must be an integer of {at_least} or more; got {shown(value)}.")


def flag(method: str, option: str, value: Any) -> None:
    """Require a boolean.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{method}.{option} must be true or false; got {shown(value)}.")


def one_of(method: str, option: str, value: Any, choices: Iterable[str]) -> None:
    """Require one of the strings ``choices``.

    Raises:
        ConfigError: It is something else.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{method}.{option} must be one of {', '.join(choices)}; got {shown(value)}.")


def share(method: str, option: str, value: Any) -> None:
    """Require a number in [0, 1].

    Raises:
        ConfigError: It is something else.
    """
    number(method, option, value)
    if not 0 <= value <= 1:
        raise ConfigError(f"{method}.{option} is a share, 0 to 1; got {shown(value)}.")
