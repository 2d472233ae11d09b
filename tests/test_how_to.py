"""What the how-to pages say is what the code does: their Python runs, and so do their command lines.

Most are run from top to bottom in one folder, as a reader would; those that train do so in the slow tier. The pages on
models and protocols have tests of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fednorm
from fednorm.config import resolve

ROOT = Path(__file__).resolve().parents[1]
OWN_TESTS = {"your-model.md": "test_docs_your_model.py", "protocols.md": "test_protocols.py"}
GPU = "on-a-gpu.md"
DATA = "your-data.md"
PAGES = [ROOT / "docs/how-to" / DATA]

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


@pytest.mark.few(1)
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
    done = run("-c", "from fednorm.cli.app import main; main()", *line.split()[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_gpu_s_calls_are_ones_that_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = []

    def take(kind: str) -> Callable[..., None]:
        def call(*, device: str, config: Mapping[str, Any] | None = None, **names: str) -> None:
            tables = {section: {"name": name} for section, name in names.items()}
            resolved.append(resolve({"kind": kind, "device": device, **tables, **(config or {})}))

        return call

    monkeypatch.setattr(fednorm, "federated", take("federated"))
    monkeypatch.setattr(fednorm, "continual", take("continual"))
    text = (ROOT / "docs/how-to" / GPU).read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, GPU, "exec"), {"__name__": "example"})
    assert [(config.device, config.amp, config.compile) for config in resolved] == [
        ("cuda", "none", False),
        ("cuda:1", "bf16", True),
    ]


def test_pages_with_tests_of_their_own_have_them() -> None:
    for page, test in OWN_TESTS.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8")


def test_there_is_something_to_run() -> None:
    assert modules()
    assert len(COMMANDS) >= 4


# Pages from top to bottom ---------------------------------------------------------------------------------------------

QUICK = ("flower-app.md",)
WHOLE = [
    *(page for page in sorted((ROOT / "docs/how-to").glob("*.md")) if page.name not in (*OWN_TESTS, GPU, DATA)),
    ROOT / "docs/start/runs.md",
]


def fenced(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_page(page: Path, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    for language, code in fenced(page):
        first = code.splitlines()[0]
        if language in ("python", "toml") and re.fullmatch(r"# \w+\.(py|toml)", first):
            (folder / first.removeprefix("# ")).write_text(code, encoding="utf-8")
            continue
        if language == "python":
            commands = [[sys.executable, "-c", code]]
        elif language == "bash":
            lines = [line for line in code.splitlines() if line.startswith("fednorm ") and "DIR" not in line]
            commands = [["bash", "-c", f"{sys.executable} -m {line}"] for line in lines if runs_here(line)]
        else:
            continue
        for command in commands:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{page.name}: {command[-1]}\n{done.stderr}"
            assert done.stdout.strip() or done.stderr.strip(), f"{page.name}: {command[-1]} shows nothing"


def runs_here(line: str) -> bool:
    """Leave out what needs a study that the page only describes, another runtime, or many minutes."""
    needs = ("runs/study", "runs/office_small", "study.toml", "--runtime flower", "--runtime dep", "--evaluate own")
    return not any(part in line for part in needs)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WHOLE if page.name in QUICK], ids=lambda page: page.stem)
def test_a_quick_page_runs(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WHOLE if page.name not in QUICK], ids=lambda page: page.stem)
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path)


def test_every_how_to_page_is_run_by_a_test() -> None:
    pages = {page.name for page in (ROOT / "docs/how-to").glob("*.md")}
    assert pages == {*OWN_TESTS, GPU, DATA, *(page.name for page in WHOLE if page.parent.name == "how-to")}
    assert all(fenced(page) for page in WHOLE if page.name != "index.md")
