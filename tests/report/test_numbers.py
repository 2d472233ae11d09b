"""Numbers as text: rounded once, in decimal, half to even, by one function for every place that shows them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednorm.report.numbers import ends, fixed, percent, signed, significant


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.8125, "81.2"),  # a tie goes to the even digit
        (0.8135, "81.4"),  # a tie in decimal, a little less in binary
        (0.60545, "60.5"),  # rounded first to four digits it would be 60.6
        ((0.812 + 0.813 + 0.8125) / 3, "81.2"),  # whichever way the sum rounded
        (0.3095, "31.0"),
        (0.30949999, "30.9"),
        (1.0, "100.0"),
        (-0.0004, "0.0"),
        (-0.0321, "−3.2"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_a_share_is_rounded_once(share: float | None, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("share", "text"), [(0.0985, "+9.8"), (-0.0995, "−10.0"), (0.00049, "0.0"), (0.0, "0.0")])
def test_a_difference_has_its_sign(share: float, text: str) -> None:
    assert signed(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.2745, "0.274"),
        (0.27451, "0.275"),
        (31.0, "31"),
        (12345.678, "12346"),
        (999.6, "1000"),
        (0.1 + 0.1745, "0.274"),  # a tie but for the noise
        (1234567.0, "1.23e+06"),
        (0.99999, "1"),
        (0.000012345, "1.23e−05"),
        (-2.5, "−2.5"),
        (0.0, "0"),
    ],
)
def test_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_ends_of_an_interval() -> None:
    assert ends(-0.018, 0.18) == "[−1.8, 18.0]"
    assert ends(None, None) == "–"
    assert fixed(2.25) == "2.2"
    assert fixed(3.5, 0) == "4"


@given(st.floats(-2, 2))
def test_nothing_is_nearer_than_what_is_printed(share: float) -> None:
    printed = Fraction(percent(share).replace("−", "-"))
    assert abs(printed - 100 * Fraction(repr(share))) <= Fraction(1, 20) + Fraction(1, 10**9)
