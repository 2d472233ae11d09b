"""What the how-to pages say is what the code does: their Python runs, and so do their command lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs/how-to").glob("*.md"))


FENCED = [
    (language, code)
    for page in PAGES
    for language, code in re.findall(
        r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]


def blocks(language: str) -> list[str]:
    return [code for of, code in FENCED if of == language]


def modules() -> dict[str, str]:
    """Return the blocks that are files, by the name in their first line."""
    named = {
        code.splitlines()[0].removeprefix("# ").strip(): code for code in blocks("python") if code.startswith("# ")
    }
    return {name: code for name, code in named.items() if re.fullmatch(r"\w+\.py", name)}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("code", [code for code in blocks("python") if code not in modules().values()])
def test_python_examples_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


COMMANDS = [line for code in blocks("") for line in code.splitlines() if line.startswith("fednorm ")]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if "DIR" not in line])
def test_command_lines_run(line: str, tmp_path: Path) -> None:
    for name, code in modules().items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    done = run("-c", "from fednorm.cli import main; main()", *line.split()[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_there_is_something_to_run() -> None:
    assert modules()
    assert len(COMMANDS) >= 4
