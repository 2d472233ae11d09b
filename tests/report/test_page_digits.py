"""The page prints the digits that the tables print: one way to round in two languages, and every record we keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fednorm.records.results import load
from fednorm.report import numbers, page_data
from fednorm.report.comparison import Comparison, comparison_table
from fednorm.report.notebook import TABLES
from fednorm.report.page import write_page
from fednorm.report.sections import sections

RECORDS = sorted(path for path in Path(".records").glob("*.json") if path.name != "matrix.json")

PAGES: dict[str, Callable[[float], str]] = {
    "show(x, true)": numbers.percent,
    "withSign(x, true)": numbers.signed,
    "show(x, false)": numbers.significant,
    "fixed(x, 0)": partial(numbers.fixed, places=0),
    "fixed(x, 2)": partial(numbers.fixed, places=2),
}
"""What the page's scripts call, and what tables do."""


@pytest.mark.slow
def test_the_page_rounds_as_the_tables_do(chromium: Any) -> None:
    drawn = np.random.default_rng(0)
    ties = [k / 2000 for k in range(-40, 2200, 7)] + [sum(k / 1000 for k in (a, a + 1)) / 2 for a in range(800, 900)]
    sizes = [float(x) for x in drawn.standard_normal(300) * 10.0 ** drawn.integers(-7, 8, 300)]
    values = [*ties, *sizes, 0.0, 0.60545, 999.6, 999999.6, 0.2745, 9.995e-5, 99950.0]
    own = (Path(page_data.__file__).parent / "assets" / "numbers.js").read_text(encoding="utf-8")
    chromium.get("about:blank")
    for call, told in PAGES.items():
        found = chromium.execute_script(f"{own}\nreturn arguments[0].map((x) => {call})", values)
        assert found == [told(value) for value in values], call


@pytest.mark.slow
@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_the_page_of_a_record_prints_the_digits_of_its_tables(record: Path, chromium: Any, tmp_path: Path) -> None:
    loaded = load([record])
    write_page(tmp_path / "page.html", loaded)
    chromium.get((tmp_path / "page.html").as_uri())
    for section in sections(loaded):
        comparison = section.comparison
        chromium.execute_script("document.getElementById(arguments[0])?.click()", f"tab-{section.id}")
        shown = read(chromium, f"#{section.id}")
        chromium.execute_script(
            "const s = document.querySelector(arguments[0]); if (!s) return; "
            "s.value = 'std'; s.dispatchEvent(new Event('change'))",
            f"#{section.id} .comparing select",
        )
        deviations = read(chromium, f"#{section.id}")
        assert shown.keys() == {method.label for method in comparison.methods}
        compare(comparison, shown, deviations)


def read(chromium: Any, section: str) -> dict[str, dict[str, str]]:
    """Return the comparison's cells as text, by method and by column."""
    code = """
      const table = document.querySelector(arguments[0] + " .comparison");
      const heads = [...table.tHead.rows[0].cells].map((cell) => cell.innerText.trim().replace(/\\s+/g, " "));
      return [...table.tBodies].map((body) => [body.querySelector(".name > span:last-child").textContent,
        [...body.rows[0].cells].map((cell, i) => [heads[i], cell.innerText.replace(/\\n+/g, " | ")])]);
    """
    found = chromium.execute_script(code, section)
    return {name: {head.rstrip(" ↕↑↓"): text for head, text in cells} for name, cells in found}


def compare(comparison: Comparison, shown: dict[str, dict[str, str]], deviations: dict[str, dict[str, str]]) -> None:
    """Hold the page's cells against the tables that a terminal shows of the same comparison."""
    head = comparison.score(comparison.headline)
    assert head is not None
    table = comparison_table(comparison)
    for row in table.rows:
        told = dict(zip(table.columns, row, strict=True))
        cells = {name: text.split(" | ") for name, text in shown[told["method"]].items()}
        spread = deviations[told["method"]][head.label].split(" | ")[1:2]
        column = {name.partition(" from")[0].partition(":")[0]: text for name, text in cells.items()}
        difference = " ".join(column.get("difference", [])).replace("] ", "], ").replace(" better", " seeds better")
        pairs = [
            (told[head.label], cells[head.label][0]),
            (told.get("95 % interval"), cells[head.label][1:2]),
            (told.get("± sd"), spread),
            (told.get("difference"), difference),
            (told.get("rank"), column.get("mean rank")),
            (told.get("paper"), column.get("paper", [])[:1]),
            (told.get("ours − paper"), column.get("paper", [])[1:2]),
        ]
        for expected, found in pairs:
            if expected not in (None, "–"):
                assert "".join(found).removeprefix("ours ") == expected
    results = [result for method in comparison.methods for result in method.results]
    plain = TABLES[comparison.kind](results)
    for row in plain.rows:
        told = dict(zip(plain.columns, row, strict=True))
        own, other = shown[told["method"]], deviations[told["method"]]
        for name in told.keys() & own.keys() - {"method"}:
            mean, _, rest = told[name].partition(" (")[0].partition(" ")
            assert own[name].split(" | ")[0] == mean, name
            assert not rest or other[name].split(" | ")[1] == rest


def test_every_record_is_there() -> None:
    assert len(RECORDS) >= 10
