from __future__ import annotations

import pytest

from fednorm.cards import FAMILIES, NORMS, Family
from fednorm.errors import UnknownNameError
from fednorm.literals import literal


@pytest.mark.parametrize("plural", FAMILIES)
@pytest.mark.parametrize("field", ["name", "summary", "reconstruction"])
def test_what_a_file_states_is_what_its_card_says(plural: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[plural]
    cards = {name: getattr(family[name], field) for name in family.built_in}
    monkeypatch.setattr("fednorm.cards._CARDS", {})
    assert {name: family.stated(name, field, "") for name in family.built_in} == cards


def test_a_statement_is_read_without_the_files_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fednorm.cards._CARDS", {})
    monkeypatch.setattr(Family, "_find", lambda *_: pytest.fail("it was imported"))
    assert NORMS.stated("L1-Norm", "reconstruction", "").startswith("The exact L1 layer")
    assert NORMS.stated("batch_norm", "reconstruction", "") == ""


@pytest.mark.parametrize(
    "source",
    [
        "SPEC = NormSpec(name='x', summary='a' + word)",
        "SPEC = NormSpec(name='x', **others)",
        "SPEC = replace(OTHER, name='x')",
        "SPEC = OtherSpec(summary='x')",
        "x = 1",
    ],
)
def test_a_card_that_is_made_by_other_means_is_imported(source: str) -> None:
    with pytest.raises(ValueError, match=r"states no summary|malformed node"):
        literal(source, "NormSpec", "summary", "")


def test_an_unknown_name_is_refused_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Family, "_find", lambda *_: pytest.fail("it was imported"))
    with pytest.raises(UnknownNameError, match=r"no norm named 'batch_nrom'\. Did you mean 'batch_norm'"):
        NORMS.require("batch-nrom")
    NORMS.require("batch-norm")
    NORMS.require("a.module:Norm")  # whether there is one, its import tells
