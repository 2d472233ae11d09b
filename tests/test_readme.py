"""The README is one page, what it says is what the code does, and its numbers are made from records."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)

sys.path.insert(0, str(ROOT / "docs"))

from _make import readme, results  # noqa: E402 - the documentation's own tools are no package of ours
from fednorm.report.comparison import Comparison, Method  # noqa: E402
from fednorm.study.statistics import Difference, Interval  # noqa: E402


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.parametrize("code", [code for language, code in FENCED if language == "python"])
def test_python_examples_run(code: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_ci_runs_the_test_line() -> None:
    line = next(code for language, code in FENCED if language == "bash" and "pytest" in code).strip()
    assert line.startswith("python3 -m venv .venv && ")
    assert "test-line" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_its_made_blocks_are_what_records_and_cards_say() -> None:
    assert readme.page() == README, "run: python docs/make.py"


def test_every_method_that_ships_is_named_with_its_file() -> None:
    linked = dict(re.findall(r"\[(\w+)\]\(((?:fednorm|strategies|scenarios)/\S+)\)", readme.catalogue()))
    for path in (ROOT / "fednorm/norms").glob("[a-z]*.py"):
        assert linked[path.stem] == f"fednorm/norms/{path.name}"
    for path in linked.values():
        assert (ROOT / path).is_file()


def test_every_answer_has_its_command() -> None:
    rows = [line for line in readme.answers().splitlines() if line.startswith("| [")]
    assert len(rows) == len(results.QUESTIONS) == 7
    for row, question in zip(rows, results.QUESTIONS, strict=True):
        assert f"`fednorm compare {question.study} " in row
        assert (ROOT / f"fednorm/recipes/{question.study}.toml").is_file()
        assert (ROOT / f"docs/results/{question.study}.md").is_file()


def _compared(low: float | None, high: float | None, mean: float) -> tuple[Method, Comparison]:
    found = Difference(3, mean, low, high, better=2, worse=1, ties=0, method="t", level=0.95)
    score = {"mean": Interval(3, 0.5, 0.01, low, high, method="t", level=0.95)}
    method = Method("b", (), score, {"mean": found}, None, {}, "a")
    return method, Comparison("data", "federated", "mean", (), (method,), "a", ())


@pytest.mark.parametrize(
    ("low", "high", "mean", "word"),
    [
        (0.001, 0.02, 0.01, "yes"),
        (-0.001, 0.02, 0.01, "not shown"),
        (-0.02, -0.001, -0.01, "no, behind"),
        (None, None, 0.01, "ahead; one seed"),
        (None, None, -0.01, "behind; one seed"),
    ],
)
def test_an_answer_is_what_its_interval_says(low: float | None, high: float | None, mean: float, word: str) -> None:
    verdict, difference = results.verdict(*_compared(low, high, mean))
    assert verdict == word
    assert difference.startswith("+1.0" if mean > 0 else "−1.0")


def test_commands_and_options_exist() -> None:
    from typer.main import get_command

    from fednorm.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert re.findall(r"`fednorm (\w+)", README)
    for words in map(str.split, re.findall(r"(?:\.venv/bin/|`)fednorm ([a-z][^`\n]*)", README)):
        command = commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
