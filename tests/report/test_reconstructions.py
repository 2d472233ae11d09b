"""A table whose numbers are of a reconstructed formula says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fednorm.cards import _CARDS, NORMS
from fednorm.report._common import reconstructions


def test_norms_that_are_reconstructions_are_marked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [{"config": {"norm": {"name": name}}} for name in ("sws", "group_norm", "mine:Norm", "group-norm")]
    marks = {"sws": "", "group_norm": "The number of groups."}
    cards = {name: replace(NORMS[name], reconstruction=mark) for name, mark in marks.items()}
    monkeypatch.setitem(_CARDS, "norms", {**_CARDS["norms"], **cards})
    assert reconstructions(results) == ["group_norm (reconstruction, unverified): The number of groups."]
