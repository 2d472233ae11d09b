"""What a value may be before anybody computes with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fednorm.errors import ConfigError

MOST_DEPTH = 12
"""Tables in tables; no configuration has more than four."""
MOST_TEXT = 4096
"""Characters of a text: the longest path of a file that Linux takes."""
MOST_VALUES = 100_000
"""Keys and values of a configuration or a study in all."""
INTEGER = 2**63
"""Integers are those of 64 bits, as in TOML."""
SEED = 2**128
"""But for seeds, which are hashed and may come from elsewhere."""
LARGEST_FLOAT = 3.4028234663852886e38
"""The largest finite number of 32 bits, in which networks compute."""

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_UNPRINTABLE = re.compile(f"{_UNSEEN.pattern}|[\t\n\r]")


def shown(value: Any, most: int = 80) -> str:
    """Return a value for an error: its ``repr``, cut where it is long; safe and quick whatever the value is."""
    if isinstance(value, int) and not -(10**most) < value < 10**most:
        return f"an integer of about {int(value.bit_length() * math.log10(2)):,} digits"
    if isinstance(value, str):
        value, extra = value[:most], len(value) - most
        return repr(value) + (f"... ({extra:,} characters more)" if extra > 0 else "")
    if isinstance(value, Mapping | list | tuple | set) and len(value) > most:
        return f"a {type(value).__name__} of {len(value):,} entries"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a nest of lists, or a huge integer in one
        return f"a {type(value).__name__}"
    return text if len(text) <= 2 * most else text[: 2 * most] + "..."


def require_plain(values: Any, what: str, *, lines: bool = False) -> None:
    """Refuse what is no configuration, whatever its keys mean, before anything recurses into it.

    Args:
        values: Nested tables and lists.
        what: What they are, for an error: ``The configuration``, a file's path.
        lines: Whether texts may have several lines, as a study's description has.

    Raises:
        ConfigError: It is no table, or there is a value that no key takes: nested too deep, of another type (a date),
            a number beyond 64 bits, a text that is too long or has control characters.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} is a table of keys; got {shown(values)}.")
    for count, (path, value) in enumerate(_walk(values, what)):
        if count > MOST_VALUES:
            raise ConfigError(f"{what} has more than {MOST_VALUES:,} values. Take most of them out.")
        if not isinstance(value, Mapping | list | tuple):
            _require_scalar(shown(".".join(path)).strip("'"), value, _UNSEEN if lines else _UNPRINTABLE)


def _walk(values: Mapping[Any, Any], what: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value with its path, without recursion."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), values)]
    while pending:
        path, value = pending.pop()
        if path:
            yield path, value
        if len(path) > MOST_DEPTH:
            raise ConfigError(
                f"{what} nests tables or lists more than {MOST_DEPTH} deep, at {shown('.'.join(path))}; no key does."
            )
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or len(key) > MOST_TEXT or _UNPRINTABLE.search(key):
                    raise ConfigError(
                        f"{what} has a key {shown(key)} where keys are short texts without control characters."
                    )
            pending += [((*path, key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            pending += [((*path, str(number)), inner) for number, inner in enumerate(value)]


def _require_scalar(key: str, value: Any, refused: re.Pattern[str]) -> None:
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ConfigError(f"{key} is a text of at most {MOST_TEXT} characters; got {shown(value)}.")
        if refused.search(value):
            raise ConfigError(f"{key} is a text without control characters; got {shown(value)}.")
    elif isinstance(value, int):
        if not -SEED < value < SEED:
            raise ConfigError(f"{key} is a number of at most 64 bits (a seed of 128); got {shown(value)}.")
    elif not isinstance(value, float) and value is not None:
        raise ConfigError(
            f"{key} takes true or false, a number, a text, or a list of them; got {shown(value)} "
            f"({type(value).__name__})."
        )


def require_float(key: str, value: float) -> float:
    """Return a number that a network can compute with.

    Raises:
        ConfigError: It is infinite, none, or beyond the largest number of 32 bits.
    """
    if not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number; got {value!r}.")
    if abs(value) > LARGEST_FLOAT:
        raise ConfigError(
            f"{key} must be a finite number of 32 bits, in which networks compute, at most {LARGEST_FLOAT:.2g}; got "
            f"{value!r}."
        )
    return value


def require_path(path: Path, option: str) -> None:
    """Refuse a path that no file system takes, before anything is made for it.

    Args:
        path: The path.
        option: How it was given.

    Raises:
        ConfigError: It, or a name in it, is too long, or it has a zero byte.
    """
    encoded = str(path).encode(errors="surrogateescape")
    if b"\x00" in encoded or len(encoded) > 4095 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise ConfigError(
            f"{option} names a path that no file system takes (at most 255 bytes a name, 4,095 in all, no zero byte); "
            f"got {shown(str(path))}."
        )
