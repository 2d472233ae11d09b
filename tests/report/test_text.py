"""Strangers' text in terminals, Markdown and spreadsheets is shown, not obeyed; files are written whole."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fednorm.errors import RecordError
from fednorm.records.formats import Unfit, migrated
from fednorm.report._common import Table
from fednorm.report.export import export, write_summary
from fednorm.report.files import write_whole
from fednorm.report.text import file_name, in_csv, in_markdown, one_line, printable

NASTY = st.text(
    st.sampled_from("abc \x1b[]()<>|&`$*#_=+-@\\\n\r\t\x07\x9b\u202e\ud800é–−0123456789") | st.characters(), max_size=30
)


@given(NASTY)
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = one_line(text)
    assert not set(map(ord, shown)) & {*range(32), *range(127, 160), 0x202E}
    shown.encode("utf-8")
    assert printable(shown) == shown
    table = Table(text, ("a", text), ((text, text),), (text,))
    console = Console(file=io.StringIO(), force_terminal=False, width=300)
    console.print(table.rich())
    assert not set(console.file.getvalue()) & {"\x1b", "\x9b", "\x07", "\u202e"}  # type: ignore[attr-defined]


def test_characters_that_are_written_out() -> None:
    assert printable("a\x1b[31mb\x07") == "a\\x1b[31mb\\x07"
    assert printable("x\u202ey\ud800") == "x\\u202ey\\ud800"
    assert printable("é – 数 \n−") == "é – 数 \n−"
    assert one_line("two\r\n  lines") == "two lines"


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("fedavg + group_norm", "fedavg + group_norm"),
        ("+9.9 [1.8, 18.0]", "+9.9 [1.8, 18.0]"),
        ("<img src=x onerror=y>", "&lt;img src=x onerror=y>"),
        (r"\input{/etc/passwd}", r"\\input{/etc/passwd}"),
        ("$x$ `y` *z*", r"\$x\$ \`y\` \*z\*"),
        ("[a](http://b)", r"[a\](http://b)"),
        ("# head", r"\# head"),
        ("1. item", r"\1. item"),
        ("a & b &lt;", "a &amp; b &amp;lt;"),
    ],
)
def test_markdown_shows_text_and_does_nothing_else(text: str, markdown: str) -> None:
    assert in_markdown(text) == markdown


@given(NASTY)
def test_markdown_never_holds_a_tag_or_another_column(text: str) -> None:
    markdown = Table("t", ("name", "value"), ((text, "1"),)).markdown()
    row = markdown.splitlines()[-2]
    assert "<" not in row
    assert row.replace("\\\\", "").replace("\\|", "").count("|") == 3


@given(NASTY)
def test_a_csv_holds_no_formula(text: str) -> None:
    cell = in_csv(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert cell.removeprefix("'") == text.removeprefix("'")


@given(NASTY, st.integers(1, 80))
def test_a_name_is_no_path(text: str, most: int) -> None:
    name = file_name(text, most)
    assert Path(name).name == name
    assert name not in (".", "..")
    assert 0 < len(name) <= max(most, len("unnamed"))


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.md"
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert [file.name for file in path.parent.iterdir()] == ["table.md"]
    beside = tmp_path / "beside"
    beside.touch()
    assert path.stat().st_mode == beside.stat().st_mode


FULL = """
import resource, sys
from pathlib import Path
from fednorm.errors import RecordError
from fednorm.report.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_whole(Path(sys.argv[1]), "x" * 5000)
except RecordError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Cannot write {path}: File too large. Choose another place.")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(RecordError, match=r"Cannot write .*page\.html: .* Choose another place"):
        write_whole(tmp_path / "page.html", "text")


# Records with odd values ----------------------------------------------------------------------------------------------


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("data", "title"), "a\ud800b", "lone surrogate"),
        (("final", "mean"), float("nan"), "a number that was not measured is null"),
        (("parameters",), 10**30, "whole numbers have 64 bits"),
        (("plan",), deep(40), "tables within each other"),
        (("hash",), "x/../../VICTIM", "its hash is letters and digits"),
    ],
)
def test_an_odd_value_is_named_and_leaves_the_others(place: tuple[str, ...], value: Any, reason: str) -> None:
    result = json.loads(Path(".records/digits_small.json").read_text())["results"][0]
    assert migrated(result)["hash"] == result["hash"]
    table = result
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    with pytest.raises(Unfit, match=reason):
        migrated(result)


def test_a_record_s_words_become_no_path_and_no_formula(tmp_path: Path) -> None:
    from fednorm.report.tensorboard import write_events

    result = json.loads(Path(".records/digits_small.json").read_text())["results"][0]
    victim = tmp_path / "VICTIM" / "events.out.tfevents.1"
    victim.parent.mkdir()
    victim.touch()
    result = {**result, "hash": "x/../../VICTIM", "data": {**result["data"], "title": '=HYPERLINK("http://x")'}}
    events = tmp_path / "events"
    write_events(events, [result])
    assert victim.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VICTIM", "events"]
    export(tmp_path / "all.csv", [result])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert rows[0]["data"] == '\'=HYPERLINK("http://x")'


def test_a_huge_seed_is_exported(tmp_path: Path) -> None:
    result = json.loads(Path(".records/digits_small.json").read_text())["results"][0]
    result["config"]["seed"] = 2**70
    export(tmp_path / "all.csv", [migrated(result)])
    assert next(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))["seed"] == str(2**70)
    write_summary(tmp_path / "all.json", [migrated(result)])
    assert json.loads((tmp_path / "all.json").read_text())["results"][0]["config"]["seed"] == 2**70
