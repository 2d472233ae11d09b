"""Seven changes, a file each, outside the package: written by ``fednorm new``, checked by contract, run by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fednorm import testing

SMALL = (
    "--set",
    "data.train_per_client=12",
    "--set",
    "data.test_per_domain=6",
    "--set",
    "model.width=4",
    "--rounds",
    "1",
)
STREAM = ("--experiences", "2", "--set", "train.epochs=1", "--set", "evaluate.probe_images=0")
FEW = ("--set", "scenario.train_per_experience=12", "--set", "scenario.test_per_experience=6", "--set", "model.width=4")
RUNS: dict[str, tuple[str, ...]] = {
    "norm": ("federated", *SMALL, "--norm", "my_norm:SPEC"),
    "strategy": ("federated", *SMALL, "--strategy", "my_strategy:SPEC", "--set", "strategy.step=0.25"),
    "learner": ("continual", *STREAM, *FEW, "--learner", "my_learner:SPEC", "--set", "learner.strength=0.1"),
    "scenario": ("continual", *STREAM, "--scenario", "my_scenario:SPEC"),
    "data": ("federated", "--data", "my_data:domains", "--rounds", "1", "--set", "model.width=4"),
    "model": ("federated", *SMALL[:4], "--rounds", "1", "--model", "my_model:make_net", "--set", "model.features=4"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("what", RUNS)
def test_a_new_file_runs_through_the_command_line(
    what: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert call("new", what, f"my-{what}").code == 0
    assert f"my_{what}" in (tmp_path / f"my_{what}.py").read_text()
    outcome = call(*RUNS[what], "--runs", tmp_path / "runs", "--json")
    assert outcome.code == 0, outcome.err
    named = RUNS[what][RUNS[what].index(f"--{what}") + 1]
    assert outcome.document["config"][what]["name"] == named
    assert len(outcome.document["config"]["sources"][what]) == 12
    plain = {key: value for key, value in outcome.document["final"].items() if key != "round"}
    again = call(*RUNS[what], "--runs", tmp_path / "again", "--json")
    assert {key: value for key, value in again.document["final"].items() if key != "round"} == plain


def test_a_new_adaptation_runs_through_the_command_line(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert call("new", "adaptation", "my-adaptation").code == 0
    path = "my_adaptation:SPEC"
    words = ("--set", f"evaluate.adaptation.name={path}", "--set", "evaluate.adaptation.strength=2.0", "--json")
    outcome = call("federated", *SMALL, "--held-out", "photo", "--runs", tmp_path / "runs", *words)
    assert outcome.code == 0, outcome.err
    (told,) = outcome.document["adaptation"]["methods"]
    assert (told["name"], told["options"]["strength"]) == (path, 2.0)
    assert 0 <= told["mean"] <= 1
    plain = call("federated", *SMALL, "--held-out", "photo", "--set", f"evaluate.adaptation={path}", "--json")
    assert [row["name"] for row in plain.document["adaptation"]["methods"]] == [path]
    assert plain.document["final"]["per_domain"] == outcome.document["final"]["per_domain"]


@pytest.mark.slow
@pytest.mark.parametrize("what", [*RUNS, "adaptation"])
def test_a_new_file_keeps_its_contract(what: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert call("new", what, f"own_{what}").code == 0
    attribute = {"data": ":domains", "model": ":make_net"}.get(what, ":SPEC")
    testing.CHECKS[what](f"own_{what}{attribute}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nrom", "x"), "what must be one of norm, strategy, learner, scenario, data, model, adaptation; got 'nrom'."),
        (("norm", "my norm"), "letters, digits and '_', lower case; got 'my norm'"),
        (("norm", "class"), "got 'class'"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], words: str, call: Any, refused: Any) -> None:
    refused(call("new", *arguments), words)


def test_nothing_is_overwritten(call: Any, refused: Any, tmp_path: Path) -> None:
    assert call("new", "norm", "mine", "--folder", tmp_path).code == 0
    refused(call("new", "norm", "mine", "--folder", tmp_path), "is there already")
