"""What the README says is what the code does: its examples run, its tables are what its commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


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


def test_tables_are_what_their_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    from fednorm.cli.report import run_report

    summaries = sorted((ROOT / ".records").glob("*.json"))
    assert summaries, "the README's tables are made from summaries in .records"
    shown = re.findall(r"fednorm report (\.records/\S+\.json) --markdown", README)
    assert {ROOT / path for path in shown} == set(summaries)
    for path in summaries:
        curve = f".records/{path.name} --curve" in README
        run_report([path], style="markdown", curve=curve)
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert rows
        missing = [row for row in rows if row not in README]
        assert not missing, f"{path.name}: the README does not show {missing}"


def test_commands_and_options_exist() -> None:
    from typer.main import get_command

    from fednorm.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^(?:\.venv/bin/)?fednorm (.+)$", README, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        command = commands[words[0]]
        if hasattr(command, "commands"):
            command = command.commands[words[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
