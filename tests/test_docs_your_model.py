"""The page on one's own model: its code blocks are run in their order, in one folder, as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(
    r"(?:<!-- file: (\S+) -->\n)?```(\w+)\n(.*?)```",
    (ROOT / "docs/how-to/your-model.md").read_text(encoding="utf-8"),
    flags=re.DOTALL,
)


@pytest.mark.slow
def test_the_pages_blocks_run(tmp_path: Path) -> None:
    cli = f'{sys.executable} -P -c "from fednorm.cli.app import main; main()"'
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    assert [language for _, language, _ in BLOCKS].count("bash") == 4
    for file, language, code in BLOCKS:
        if file:
            (tmp_path / file).write_text(code)
            continue
        command = (
            [sys.executable, "-c", code] if language == "python" else ["bash", "-c", code.replace("fednorm", cli, 1)]
        )
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert done.stdout.strip()


@pytest.mark.slow
def test_the_pages_model_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fednorm.cards import MODELS

    (tmp_path / "mynets_of_the_page.py").write_text(next(code for file, _, code in BLOCKS if file))
    monkeypatch.syspath_prepend(tmp_path)
    assert list(MODELS["mynets_of_the_page:make_net"].declared) == ["hidden"]
