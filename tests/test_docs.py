"""The documentation says what the code, its cards and the records say; its links lead somewhere; the site builds."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import fednorm
from fednorm.cards import FAMILIES, NORMS
from fednorm.config import SECTION_VALUES
from fednorm.records import formats

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from _make import blocks, docstrings, methods, prose, readings, reference, results, trust  # noqa: E402 - the documentation's own tools are no package of ours

MADE_FOLDERS = ("_build", "_made", *(f"methods/{plural}/" for plural in FAMILIES))
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if not str(path.relative_to(DOCS)).startswith(MADE_FOLDERS)
    and path.name not in ("commands.md", "configuration.md", "records.md")
)
SUMMARIES = sorted((ROOT / ".records").glob("*.json"))
ANALYSES_MADE = sorted((ROOT / ".records/analyses").glob("*.json"))


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


@pytest.mark.parametrize("path", ANALYSES_MADE, ids=lambda path: path.stem)
def test_an_analysis_has_its_page_and_its_commands(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fednorm.cli.analyse import run_analyse

    text = (DOCS / f"results/{path.stem}.md").read_text(encoding="utf-8")
    assert f"<!-- analysis-{path.stem} -->" in text
    assert f"fednorm analyse .records/analyses/{path.name} --markdown" in text
    assert re.search(
        rf"^fednorm analyse {path.stem}( --[\w-]+ \S+)* --out \.records/analyses/{path.name}$", text, re.MULTILINE
    )
    run_analyse(
        str(path), data="digits_mini", data_dir=None, seeds="1", steps=0, out=None, markdown=True, as_json=False
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows
    assert all(row in text for row in rows)


@pytest.mark.slow
def test_the_results_pages_are_as_their_command_writes_them() -> None:
    stale = [path.name for path, text in results.pages() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run: {blocks.COMMAND}"


def settings_of(study: str) -> set[str]:
    """Return the numbers of a study's configurations as text: what a sentence may name of how it was run."""

    def numbers(value: object) -> set[str]:
        if isinstance(value, dict):
            return set().union(*map(numbers, value.values()))
        return {f"{value:g}"} if isinstance(value, float) else set()

    return set().union(*(numbers(result["config"]) for result in results.summary(study).results))


PAPERS = {"7.68"}
"""Numbers of papers that pages of results quote."""


def test_no_score_is_typed_by_hand() -> None:
    """What is written about results has no number with a decimal but from the record, a setting, or a quoted paper."""
    allowed = PAPERS.union(*map(settings_of, results.shown()))
    for name, page in results.shown().items():
        text = re.sub(r"^<!-- (\S+) -->$.*?^<!-- /\1 -->$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        sentences = re.sub(readings.PLACE, "", readings.readings().get(name, ""))  # a method's label has its settings
        typed = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", text + sentences))
        assert typed <= allowed, f"{page.name}: {sorted(typed - allowed)}"


def test_a_reading_s_numbers_are_the_record_s() -> None:
    assert "by 9.9 points (95 % interval 1.8 to\n18.0)" in readings.reading("office_small")
    assert "in the paper it is by 7.8." in readings.reading("office_small")
    with pytest.raises(StopIteration):
        readings._method(results.compared("office_small")[0], "fedbm")


def test_the_pages_of_trust_are_as_their_command_writes_them() -> None:
    stale = [path.name for path, text in trust.pages() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run: {blocks.COMMAND}"


def test_the_golden_table_says_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from fednorm.cli.verify import run_golden

    run_golden(trust.TRACES, as_json=False)
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    rows = [re.split(r" \| ?", line.strip("| "))[:2] for line in trust.golden().splitlines()[2:]]
    assert len(rows) == len(printed) > 20
    assert [name for name, _ in rows] == [file.removesuffix(".npz") for file, _ in printed]
    assert {status for _, status in rows} == {"pass"}, "a trace without a method, or one that fails"


def test_every_fault_names_tests_that_are_there() -> None:
    named = [test for group in trust.groups() for row in group["fault"] for test in row["tests"]]  # type: ignore[attr-defined]
    assert len(named) > 40
    for test in named:
        path, _, name = test.partition("::")
        assert name in trust.tests_of(path), test


def test_a_block_without_a_place_is_told() -> None:
    with pytest.raises(KeyError, match="no place"):
        blocks.filled("<!-- a -->\n<!-- /a -->\n", {"b": ""})


def test_no_summary_is_without_its_page() -> None:
    assert SUMMARIES
    assert set(results.shown()) >= {path.stem for path in SUMMARIES}


# Pages that cards, keys and commands make -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return dict([*methods.pages(), *reference.pages()])


def test_there_is_a_page_for_every_card_and_the_index_links_it(made: dict[str, str]) -> None:
    for plural, family in FAMILIES.items():
        assert family.built_in
        for card in family:
            page, index = made[f"methods/{plural}/{card.name}.md"], made[f"methods/{plural}/index.md"]
            assert page.startswith(f"# {card.name}\n")
            assert f"[{card.name}]({card.name}.md)" in index
            assert all(f"| `{option}` |" in page for option in card.declared)
            assert all(prose.text(sentence) in page for sentence in (*card.deviations, *card.verified))
            assert ("Reconstruction, unverified" in page) == bool(card.reconstruction)


def test_a_norm_s_page_tells_each_tensor_s_kind_and_roles(made: dict[str, str]) -> None:
    page = made["methods/norms/batch_norm.md"]
    assert "| `running_mean` | mean | keep | shared | local | local |" in page
    assert "| `weight` | scale | keep | shared | local | shared |" in page
    assert "no tensor of a normalization layer" in made["methods/norms/none.md"]


def test_the_table_of_norms_has_every_norm_and_its_cost_where_that_was_measured(made: dict[str, str]) -> None:
    rows = {line.split("](")[0][3:]: line for line in made["methods/norms/index.md"].splitlines() if "](" in line}
    assert set(FAMILIES["norms"].built_in) <= rows.keys()
    costs = methods.cost_ratios()
    without = {"none", "selu", "residual_scale"}  # which put no layer there
    without |= {"anfr"}  # not measured yet
    assert costs["maps"].keys() | costs["tokens"].keys() >= set(FAMILIES["norms"].built_in) - without
    assert f"| {costs['maps']['adab2n']} | {costs['tokens']['adab2n']} |" in rows["adab2n"]
    assert f"| – | {costs['tokens']['nalaformer']} |" in rows["nalaformer"]
    assert "| none | no | yes |" in rows["group_norm"]
    assert "| mean, var, count | yes | no |" in rows["batch_norm"]


def test_an_option_s_meaning_is_its_docstring_s() -> None:
    meanings = methods.option_meanings(FAMILIES["norms"]["adab2n"])
    assert all(meanings.values())
    assert methods.arguments(
        "Do.\n\nArgs:\n    a: One,\n        two.\n    b (int): Three.\n\nReturns:\n    c: No.\n"
    ) == {
        "a": "One, two.",
        "b": "Three.",
    }


def test_a_reconstruction_is_marked() -> None:
    card = dataclasses.replace(FAMILIES["norms"]["rms_norm"], reconstruction="The exponent is a guess.")
    object.__setattr__(card, "origin", "fednorm.norms.rms_norm")
    assert "**Reconstruction, unverified.** The exponent is a guess." in methods.page("norms", card)


def test_every_configuration_key_is_told_with_its_default(made: dict[str, str]) -> None:
    text = made["reference/configuration.md"]
    for name, section in SECTION_VALUES.items():
        part = text.partition(f"## \\[{name}\\]\n")[2].partition("\n## ")[0]
        for key, info in section.model_fields.items():
            (row,) = (line for line in part.splitlines() if line.startswith(f"| `{key}` |"))
            assert prose.text(info.description or "").replace("|", "\\|") in row
    assert "| `learning_rate` | float, greater than 0 | `0.01`; `0.03` on streams | all |" in text
    assert all(f"| `{key}` |" in text for key in ("kind", "seed", "threads", "device", "amp", "compile", "width"))


def test_every_command_and_option_is_told(made: dict[str, str]) -> None:
    text = made["reference/commands.md"]
    for words, command in reference.leaves():
        part = text.partition(f"## {words}\n")[2].partition("\n## ")[0]
        assert (command.help or "").split("\n")[0] in part.replace("\\", "")
        for parameter in command.params:
            if parameter.name != "help":
                name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper()
                assert f"`{name}`" in part or f"`{parameter.metavar}`" in part, f"{words} {name}"


def test_records_are_told_as_their_reader_needs_them(made: dict[str, str]) -> None:
    for kind, needed in formats.NEEDED.items():
        part = made["reference/records.md"].partition(f"## result.json of a {kind} run")[2].partition("\n## ")[0]
        told = set(re.findall(r"^\| \*\*(.+?)\*\* \|", part, flags=re.MULTILINE))
        assert {key for key in needed if not key.startswith("config")} - told <= {"final.per_domain", "data.notes"}


def test_the_python_page_has_every_public_name() -> None:
    text = (DOCS / "reference/python.md").read_text(encoding="utf-8")
    assert all(f"fednorm.{name}\n" in text for name in fednorm.__all__ if not name.startswith("__"))


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "page"),
    [
        ("One.\n\n    y = x * 2\n\n    z\n\nTwo.", "One.\n\n```text\ny = x * 2\n\nz\n```\n\nTwo."),
        ("See :class:`~a.b.C` and ``x_1``.", "See ``C`` and ``x_1``."),
        ("a < b, [c] https://x.org/y.", "a \\< b, \\[c] <https://x.org/y>."),
        ("The *raw* w * x, **bold b**; a*b.", "The *raw* w \\* x, **bold b**; a\\*b."),
        ("**Bold over\ntwo lines** * 2", "**Bold over\ntwo lines** \\* 2"),
        ("* one ``x * y``\n* two", "* one ``x * y``\n* two"),
        ("Text.\nFederated: a.\nDiffers: b.", "Text.\n\nFederated: a.\n\nDiffers: b."),
    ],
)
def test_docstrings_become_markdown(docstring: str, page: str) -> None:
    assert prose.markdown(docstring) == page


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["One.", "", "    y = x"], ["One.", "", "::", "", "    y = x"]),
        (["One::", "", "    y = x"], ["One::", "", "    y = x"]),
        (["Args:", "    a: One.", "", "        two"], ["Args:", "    a: One.", "", "        two"]),
        (["* item", "", "    more"], ["* item", "", "    more"]),
    ],
)
def test_formulas_in_docstrings_are_literal(before: list[str], after: list[str]) -> None:
    assert docstrings.marked(before) == after


def test_every_norm_has_its_formula_set() -> None:
    assert set(NORMS.built_in) <= methods.formulas()["norms"].keys()


def test_every_formula_is_of_a_card_and_is_set() -> None:
    pytest.importorskip("latex2mathml", reason="it is in the docs extra")
    from _make.mathml import mathml

    for plural, formulas in methods.formulas().items():
        for name, latex in formulas.items():
            assert name in FAMILIES[plural].built_in
            for part in latex.strip().split("\n\n"):
                assert mathml(part, block=True).startswith("<math")
                assert "merror" not in mathml(part, block=True)


# Links, commands, code ------------------------------------------------------------------------------------------------


def _targets(text: str) -> list[str]:
    prose_only = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose_only) if not target.startswith("http")]


def test_links_lead_somewhere(made: dict[str, str]) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *PAGES)}
    pages |= {DOCS / path: text for path, text in made.items()}
    checked = 0
    for path, text in pages.items():
        for target in _targets(text):
            there = (path.parent / target.partition("#")[0]).resolve()
            assert there in pages or there.exists(), f"{path.relative_to(ROOT)}: {target}"
            checked += 1
    assert checked > 300


def test_commands_and_options_exist() -> None:
    known = {words: {o for p in command.params for o in p.opts} for words, command in reference.leaves()}
    lines = [
        line.strip().removeprefix("$ ").removeprefix(".venv/bin/").split("#")[0]
        for path in PAGES
        for code in re.findall(r"^```(?:bash|console)?\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for line in code.splitlines()
    ]
    called = [line for line in lines if line.startswith("fednorm ")]
    assert len(called) > 40
    for line in called:
        words = line.split()
        name = max((name for name in known if line.startswith(f"{name} ") or line.strip() == name), key=len, default="")
        assert name, line
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known[name], line


def test_notebooks_are_python() -> None:
    cells = [
        (path, code)
        for path in PAGES
        for code in re.findall(
            r"^```\{code-cell\} ipython3\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
    ]
    assert {path.stem for path, _ in cells} >= {"first-federation", "first-stream", "first-study"}
    for path, code in cells:
        compile(code, str(path), "exec")


def test_a_page_outside_of_how_to_and_start_has_no_python_that_nothing_runs() -> None:
    for path in PAGES:
        if path.parent.name not in ("how-to", "start"):
            assert "\n```python\n" not in path.read_text(encoding="utf-8"), path.name


def test_ci_builds_the_site() -> None:
    assert "sphinx-build -W -b html docs docs/_build/html" in (ROOT / ".ci/run").read_text(encoding="utf-8")


# The site -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    for name in ("sphinx", "furo", "myst_nb", "latex2mathml", "sphinx_copybutton"):
        pytest.importorskip(name, reason="it is in the docs extra")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command], capture_output=True, text=True, check=False, timeout=1500, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 80
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if "pages" in page.relative_to(tmp_path).parts:
            continue  # the interactive ones, which have tests of their own
        assert not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', text), f"{page.name} needs a network"
        for target in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', text):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / unquote(target)).exists(), f"{page.relative_to(tmp_path)}: {target}"
