"""Which clients are evaluated, as ``evaluate.clients`` has it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from fednorm.config.schema import nearest
from fednorm.errors import ConfigError
from fednorm.limits import INTEGER, shown

ALL_CLIENTS, SAMPLED_CLIENTS = "all", "sampled"


def _spelled(value: Any) -> Any:
    """Return ``all``, ``sampled``, or a number of clients in digits.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, str) and value in (ALL_CLIENTS, SAMPLED_CLIENTS):
        return value
    count = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if type(count) is int and 1 <= count < INTEGER:
        return str(count)
    near = nearest(value, (ALL_CLIENTS, SAMPLED_CLIENTS)) if isinstance(value, str) else ""
    raise ConfigError(
        f"evaluate.clients is all, sampled, or a number of clients, at least 1; got {shown(value)}.{near}"
    )


Evaluated = Annotated[str, BeforeValidator(_spelled)]
"""Clients to evaluate: ``all``, ``sampled``, or a number of them."""


def of_which(which: str) -> str:
    """Return whose images are scored, as the end of a clause; empty for everybody's."""
    if which == ALL_CLIENTS:
        return ""
    if which == SAMPLED_CLIENTS:
        return " of the sampled clients"
    return f" of {int(which):,} drawn clients" if which.isdecimal() else f" of clients {which!r}"  # of a damaged record
