"""``fednorm analyse``: listed, made, kept and shown; and what a mistake gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fednorm.analyses import ANALYSES


@pytest.mark.slow
def test_the_command_lists_makes_keeps_and_shows(call: Any, tmp_path: Path) -> None:
    listed = call("analyse", "--json").document["analyses"]
    assert [about["name"] for about in listed] == list(ANALYSES)
    assert all(about["about"].endswith("?") and about["papers"] for about in listed)
    file = tmp_path / "kept" / "probe.json"
    made = call("analyse", "linear_probe", "--seeds", "3", "--steps", "1", "--out", file, "--json")
    assert made.code == 0
    assert json.loads(file.read_text()) == made.document
    shown = call("analyse", file, "--markdown")
    assert shown.out.strip() == ANALYSES["linear_probe"].table(made.document).markdown().strip()


def test_mistakes_are_told_in_words(call: Any, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    for arguments, words in (
        (("norm_only", "--seeds", "1,x"), "--seeds takes numbers with commas between"),
        (("nothing.json",), "There is no file nothing.json"),
        (("other.json",), "is no document of an analysis"),
    ):
        outcome = call("analyse", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert words in " ".join(outcome.err.split())
