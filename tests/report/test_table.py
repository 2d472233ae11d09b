"""The table itself: Markdown, a terminal of any width, and text that looks like markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fednorm.report._common import Table, interval, percent

COLUMNS = ("method", "average accuracy", "forgetting (max − last)", "seconds")
ROWS = (
    ("er_ace + batch_norm (passes=separate)", "54.1 ± 1.2", "25.0 ± 0.3", "34"),
    ("er + none", "4.1", "–", "7"),
)


def shown(table: Table, width: int) -> list[str]:
    """Return the lines of a terminal so many characters wide."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_markdown_keeps_its_columns() -> None:
    table = Table("A | title", ("name", "a|b"), (("x | y", "1"),), ("A note | too.",))
    assert table.markdown() == ("**A | title**\n\n| name | a\\|b |\n| --- | ---: |\n| x \\| y | 1 |\n\nA note | too.")


@pytest.mark.parametrize("in_parts", [False, True])
def test_what_looks_like_markup_is_shown_as_it_is(in_parts: bool) -> None:
    table = Table("[b]T[/b]", ("[red]n", "[/x]"), (("[i]1", "[bold]2"),), ("[/] [dim]N",), in_parts=in_parts)
    text = "\n".join(shown(table, 60))
    for part in ("[b]T[/b]", "[red]n", "[/x]", "[i]1", "[bold]2", "[/] [dim]N"):
        assert part in text


def test_a_table_that_fits_stands_in_one_part() -> None:
    lines = shown(Table("Title", COLUMNS, ROWS, ("One note.", "Another."), in_parts=True), 100)
    assert lines[0] == "Title"
    assert lines[1:4] == [
        "                                                   forgetting",
        "                                          average      (max −",
        "method                                   accuracy       last)  seconds",
    ]
    assert set(lines[4]) == {"─"}
    assert lines[5:] == [
        "er_ace + batch_norm (passes=separate)  54.1 ± 1.2  25.0 ± 0.3       34",
        "er + none                                     4.1           –        7",
        "One note.",
        "Another.",
    ]


def test_a_narrow_terminal_gets_parts_and_whole_numbers() -> None:
    lines = shown(Table("A title that is longer than it is wide", COLUMNS, ROWS, ("A note.",), in_parts=True), 36)
    assert max(map(len, lines)) <= 36
    text = "\n".join(lines)
    for number in ("54.1 ± 1.2", "25.0 ± 0.3", "seconds", "forgetting"):
        assert number in text
    assert text.count("er + none") == 2
    assert lines[-1] == "A note."


def test_a_terminal_too_narrow_for_anything_still_ends() -> None:
    lines = shown(Table("T", COLUMNS, ROWS, in_parts=True), 5)
    assert max(map(len, lines)) <= 5


def test_numbers_as_text() -> None:
    assert percent([0.5, None, float("nan")]) == "50.0 (n = 1)"
    assert percent([None]) == percent([]) == percent([float("inf")]) == "–"
    assert interval([1.0, 2.0], ".2f") == "1.50 ± 0.71"
