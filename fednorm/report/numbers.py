"""Numbers as text: the one place that rounds, for tables, the terminal, LaTeX, figures and the page.

A number is rounded once, in decimal, half to even: 0.8125 is 81.2 %, 0.8135 is 81.4 %. It is rounded from its first
twelve significant digits: what a float has beyond them is the noise of sums in binary, which would decide where a mean
of seeds lies exactly between two digits. The page's scripts do the same (``assets/numbers.js``), and a test holds both
together.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Context, Decimal

UNKNOWN = "–"
"""The text of what was not measured, or is not finite."""

MINUS = "−"

DIGITS = 12
"""Significant digits that a number is rounded from."""

_EXACT = Context(prec=400, rounding=ROUND_HALF_EVEN, Emax=10_000, Emin=-10_000)


def fixed(value: float | None, places: int = 1, *, sign: bool = False) -> str:
    """Return a number with so many decimal places, e.g. ``12.5`` or ``−0.3``.

    Args:
        value: The number.
        places: Decimal places, 0 or more.
        sign: Whether a number above 0 has a plus sign.
    """
    return UNKNOWN if value is None or not math.isfinite(value) else _text(_decimal(value), places, sign)


def percent(share: float | None, places: int = 1) -> str:
    """Return a share as per cent, without the sign for it: 0.8125 as ``81.2``."""
    return UNKNOWN if share is None or not math.isfinite(share) else _text(_decimal(share).scaleb(2), places, False)


def signed(share: float | None, places: int = 1) -> str:
    """Return a share as signed per cent with a real minus sign, e.g. ``+1.2`` or ``−0.3``; ``0.0`` has none."""
    return UNKNOWN if share is None or not math.isfinite(share) else _text(_decimal(share).scaleb(2), places, True)


def significant(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, without zeros that only fill up: ``0.274``, ``31``, ``1.2e−05``.

    Digits before the point are never dropped: ``12346``. Below 0.0001 and from a million on, it has a power of ten.
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    number = _decimal(value)
    if number == 0:
        return "0"
    rounded = _significant(number, digits)
    power = rounded.adjusted()
    if -4 <= power < 6:
        return _trimmed(_rounded(number, 0) if power >= digits else rounded)
    return f"{_trimmed(rounded.scaleb(-power))}e{MINUS if power < 0 else '+'}{abs(power):02d}"


def ends(low: float | None, high: float | None) -> str:
    """Return the ends of an interval of a share in per cent, e.g. ``[1.8, 18.0]``."""
    if low is None or high is None:
        return UNKNOWN
    return f"[{percent(low)}, {percent(high)}]"


def _decimal(value: float) -> Decimal:
    """Return a float's first twelve digits: what comes after them is the noise of sums in binary."""
    return Decimal(f"{value:.{DIGITS - 1}e}")


def _rounded(number: Decimal, places: int) -> Decimal:
    return number.quantize(Decimal(1).scaleb(-places), context=_EXACT)


def _significant(number: Decimal, digits: int) -> Decimal:
    return _rounded(number, digits - 1 - number.adjusted())


def _text(number: Decimal, places: int, sign: bool) -> str:
    rounded = _rounded(number, places)
    if rounded == 0:
        return f"{abs(rounded):f}"
    before = MINUS if rounded < 0 else "+" if sign else ""
    return f"{before}{abs(rounded):f}"


def _trimmed(number: Decimal) -> str:
    digits = f"{abs(number):f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{MINUS if number < 0 else ''}{digits}"
