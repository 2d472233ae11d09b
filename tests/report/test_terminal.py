"""What a terminal of any width shows: whole numbers, the columns that matter most, the time left; the answer first."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.cells import cell_len
from rich.console import Console

from fednorm.cli.answer import Answer, answers
from fednorm.records.results import load
from fednorm.report._common import Table
from fednorm.report.bars import Line, clock

SUMMARIES = sorted((Path(__file__).resolve().parents[2] / ".records").glob("*.json"))
WIDTHS = (60, 80, *(pytest.param(width, marks=pytest.mark.slow) for width in (100, 200)))


def lines_of(what: Any, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def numbers_of(cell: str) -> list[str]:
    """Return the parts of a cell that must stand in one line: what stands between spaces and has a digit."""
    return [word for word in cell.split() if re.search(r"\d", word)]


def require_whole(table: Table, width: int, *, whole: bool) -> None:
    """Check that a table is within a width, and that no cell of a number, and no number of a name, is broken."""
    lines = lines_of(table.rich(whole=whole, notes=whole), width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    (gone,) = re.findall(r"Left out at \d+ columns: (.*); --details", " ".join(" ".join(lines).split())) or [""]
    assert not (gone and whole)
    for number, head in enumerate(table.columns):
        if head in gone.split(", "):
            continue
        for row in table.rows:
            is_text = number == 0 or head in table.texts
            for part in numbers_of(row[number]) if is_text else [row[number]]:
                assert part in text, f"{part!r} of column {head!r} is broken at {width} columns"


@pytest.fixture(scope="module")
def committed() -> list[Answer]:
    """Return the answers of all records that the project keeps."""

    def read() -> Iterator[Answer]:
        for path in SUMMARIES:
            loaded = load([path])
            yield from answers(loaded.results, studies=loaded.studies)
            yield from answers(loaded.results[:1])

    return list(read())


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_of_the_committed_records_is_broken(committed: list[Answer], width: int) -> None:
    for answer in committed:
        for table in answer.tables:
            require_whole(table, width, whole=True)
            require_whole(table, width, whole=False)


def test_an_answer_has_one_table_and_a_caption_of_one_line(committed: list[Answer]) -> None:
    for answer in committed:
        assert answer.verdict
        for table in answer.asked:
            assert table.caption is None or cell_len(table.caption) <= 120
        (first, *more) = [table.title.partition(" (%)")[0] for table in answer.asked]
        assert first in ("Comparison", "Accuracy", "Plasticity: training accuracy by experience")
        asked_for = [title for title in more if not title.startswith("Test-time adaptation")]
        assert asked_for in ([], ["Evaluation matrix"])  # which a run was asked for, as for adaptation


def test_columns_that_matter_most_stay() -> None:
    table = Table("T", ("method", "mean", "seconds", "worst"), (("fedavg", "82.3 ± 1.0", "12345678", "59.5"),))
    important = Table(table.title, table.columns, table.rows, first=("worst", "mean"))
    assert lines_of(table.rich(whole=False), 30)[1].split() == ["method", "mean", "seconds"]
    assert lines_of(important.rich(whole=False), 30)[1].split() == ["method", "mean", "worst"]
    assert lines_of(table.rich(whole=False), 30)[-2:] == ["Left out at 30 columns: worst;", "--details shows all."]
    assert "Left out" not in "\n".join(lines_of(table.rich(whole=True), 30))


def test_texts_break_between_words() -> None:
    rows = (("a", "15 of FedWon (arXiv 2306.05879)", "7"), ("b", "none", "12"))
    table = Table("T", ("name", "paper", "runs"), rows, texts=("paper",))
    lines = lines_of(table.rich(), 30)
    assert lines[1:] == [
        "name  paper               runs",
        "─" * 30,
        "a     15 of FedWon           7",
        "      (arXiv 2306.05879)      ",
        "b     none                  12",
    ]


def test_a_caption_stands_for_the_notes_and_warnings_stay() -> None:
    table = Table("T", ("name", "a"), (("x", "1"),), ("A long note.", "Missing from it: y."), "Short", ("Missing: y.",))
    assert lines_of(table.rich(notes=False), 60)[-2:] == ["Short", "Missing: y."]
    assert lines_of(table.rich(notes=True), 60)[-2:] == ["A long note.", "Missing from it: y."]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_the_time_left_is_never_cut(width: int) -> None:
    task = SimpleNamespace(
        description="er_ace + batch_channel_norm (num_groups=4)",
        fields={"state": "loss 1.456, mean accuracy 36.1 %, worst 22.1 %, 3 clients missing from the evaluation"},
        completed=123.0,
        total=2000.0,
        started=True,
    )
    (line,) = lines_of(Line(lambda _: "1:20:05 left", counted=True).render(cast(Any, task)), width)
    assert line.endswith(" 1:20:05 left")
    assert " 123/2000 " in line
    assert cell_len(line) <= width
    assert ("mean accuracy 36.1 %" in line) == (width >= 200)


def test_a_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 80, 3605, -3)] == ["0:00", "1:00", "1:20", "1:00:05", "0:00"]
