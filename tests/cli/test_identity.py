"""``fednorm explain`` prints a method's whole card, and ``fednorm list --all`` leaves nothing silently out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fednorm.cards import LEARNERS, NORMS, OPTIMIZERS, STRATEGIES, Citation
from fednorm.cli.catalogue import run_explain
from fednorm.cli.identity import cited, text_of
from fednorm.cli.listing import run_list
from fednorm.cli.reading_list import NOT_APPLICABLE
from fednorm.errors import ConfigError, UnknownNameError


def explained(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    run_explain(name, as_json=False)
    return capsys.readouterr().out


def as_document(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    run_explain(name, as_json=True)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_norms_card_says_what_becomes_of_each_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in explained("batch_norm", capsys).splitlines() if line.startswith("Tensor")]
    assert lines == [
        "Tensor weight: scale; FedAvg shared, FedBN local, SiloBN shared; at a boundary kept",
        "Tensor bias: shift; FedAvg shared, FedBN local, SiloBN shared; at a boundary kept",
        "Tensor running_mean: mean; FedAvg shared, FedBN local, SiloBN local; at a boundary kept",
        "Tensor running_var: var; FedAvg shared, FedBN local, SiloBN local; at a boundary kept",
        "Tensor num_batches_tracked: count; FedAvg shared, FedBN local, SiloBN local; at a boundary kept",
    ]
    assert "Tensors: none of its own." in explained("none", capsys)


def test_a_norms_card_as_json_has_roles_facts_and_how_it_was_verified(capsys: pytest.CaptureFixture[str]) -> None:
    document = as_document("batch_renorm", capsys)
    assert document["tensors"]["running_var"] == {
        "kind": "var",
        "carry": "keep",
        "roles": {"fedavg": "shared", "fedbn": "local", "silobn": "local"},
    }
    assert document["exact_backward"] is False
    assert document["citation"]["arxiv"] == "1702.03275"
    assert any("batchrenorm_avalanche" in line for line in document["verified"])


@pytest.mark.parametrize("name", NORMS.names)
def test_every_norms_card_can_be_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(name, capsys)
    card = NORMS[name]
    assert all(key in text for key in card.tensors)
    assert all(deviation in text for deviation in card.deviations)
    assert ("Reconstruction, unverified:" in text) == bool(card.reconstruction)
    assert "Verified: " in text
    if card.citation and card.citation.arxiv:
        assert f"https://arxiv.org/abs/{card.citation.arxiv}" in text


def test_every_built_in_method_says_how_it_was_verified() -> None:
    silent = [
        f"{family.plural}: {name}"
        for family in (NORMS, STRATEGIES, LEARNERS)
        for name in family.built_in
        if not family[name].verified
    ]
    silent += [name for name in ("sgdp", "adamp") if not OPTIMIZERS[name].verified]
    assert silent == []


def test_a_reconstruction_is_marked_where_it_is_shown() -> None:
    card = {"name": "x", "what": "norm", "summary": "Y.", "citation": None, "reconstruction": "The function."}
    assert "Reconstruction, unverified: The function." in text_of(card)


def test_a_strategys_card_has_its_roles(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Roles: mean local, var local" in explained("silobn", capsys)
    assert as_document("fedavg", capsys)["roles"] == {}
    assert "is given all experiences at once" in explained("joint", capsys)


def test_a_section_and_an_optimizer_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    told = explained("train", capsys)
    assert "linear_probe_rounds = 0    [federated runs; an integer, 0 or more]\n    First rounds" in told
    assert "learning_rate = 0.01 (streams: 0.03)    [all runs; a finite number, greater than 0]" in told
    text = explained("adamp", capsys)
    assert "Options: nesterov = False, delta = 0.1, wd_ratio = 0.1" in text
    assert "Verified: Golden trace adamp" in text


def test_a_citation_is_a_line() -> None:
    line = cited({"title": "T", "authors": "A, B.", "year": 2020, "arxiv": "1.2", "where": "ICLR"})
    assert line == "A, B. T. ICLR. 2020. https://arxiv.org/abs/1.2"
    assert cited(vars(Citation(title="T", authors="", year=2020))) == "T. 2020."


def test_list_all_names_what_is_not_here_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    run_list("", every=True, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert {"norms", "strategies", "models", "data", "scenarios", "learners", "optimizers", "studies"} < set(document)
    names = [paper["name"] for paper in document["not_applicable"]]
    expected = ["GMRT", "VacancySBERT", "SonicMaster", "dual-latent", "STARFlow", "ShiftQuant"]
    assert all(any(name.startswith(start) for name in names) for start in expected)
    assert all(paper["why"] and paper["citation"]["arxiv"] for paper in document["not_applicable"])
    run_list("norms", every=True, as_json=False)
    text = capsys.readouterr().out
    assert all(paper.name in text and paper.citation.arxiv in text for paper in NOT_APPLICABLE)
    assert "strategies:" not in text
    run_list("norms", every=False, as_json=True)
    assert set(json.loads(capsys.readouterr().out)) == {"norms"}


def test_nothing_to_list_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"What is to be listed: norms, .*studies, or all of it \(--all\)"):
        run_list("", every=False, as_json=False)
    with pytest.raises(UnknownNameError, match="Did you mean 'norms'"):
        run_list("norm", every=False, as_json=False)
