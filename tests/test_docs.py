"""The documentation says what the code, its cards and the records say; its links lead somewhere; the site builds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from _make import blocks, results  # noqa: E402 - the documentation's own tools are no package of ours

PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
SUMMARIES = sorted((ROOT / ".records").glob("*.json"))


# Results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SUMMARIES, ids=lambda path: path.stem)
def test_a_page_s_tables_are_what_their_command_prints(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fednorm.cli.report import run_report

    page = results.shown()[path.stem]
    text = page.read_text(encoding="utf-8")
    assert f".records/{path.name}" in results.command_lines(page)
    run_report([path], style="markdown", curve=f"<!-- {path.stem}-curve -->" in text)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows
    missing = [row for row in rows if row not in text]
    assert not missing, f"{page.name} does not show {missing}"


def test_the_results_pages_are_as_their_command_writes_them() -> None:
    stale = [path.name for path, text in results.pages() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run: {blocks.COMMAND}"


def test_a_block_without_a_place_is_told() -> None:
    with pytest.raises(KeyError, match="no place"):
        blocks.filled("<!-- a -->\n<!-- /a -->\n", {"b": ""})


def test_no_summary_is_without_its_page() -> None:
    assert SUMMARIES
    assert set(results.shown()) >= {path.stem for path in SUMMARIES}
