"""A command line in this process, and what every mistake of a user gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fednorm.cli.app as cli

SMALL = (
    *("--set", "model.width=4", "--train-per-client", "16", "--set", "data.test_per_domain=10"),
    *("--learning-rate", "0.03", "--rounds", "2"),
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be, numbers that are no JSON refused."""
        return json.loads(self.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fednorm", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def _refused(outcome: Outcome, *words: str) -> None:
    """Demand what every mistake of a user gets: exit code 2, a sentence that names the thing, nothing else."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    error = outcome.err[outcome.err.rindex("error: ") :]
    for word in words:
        assert word in error


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Return the options of a run that takes a tenth of a second."""
    return SMALL


@pytest.fixture(scope="session")
def refused() -> Callable[..., None]:
    return _refused
