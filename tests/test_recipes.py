"""The studies that ship: each resolves, keeps its runs, and holds numbers that belong to some of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fednorm.cards import NORMS
from fednorm.cli import recipes as command
from fednorm.cli.compare import run_compare
from fednorm.cli.recipe_list import run_list
from fednorm.data.sets.digits import DIGITS, DIGITS_FIVE
from fednorm.errors import ConfigError, DataError, UnknownNameError
from fednorm.report.numbers import percent
from fednorm.study import estimate
from fednorm.study.cases import Study
from fednorm.study.estimate import Estimate
from fednorm.study.recipes import RECIPES, find_study, outlines, recipe_names
from fednorm.study.study import read_study

SUMMARIES = Path(__file__).parents[1] / ".records"

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "digits": (*DIGITS, *DIGITS_FIVE),
    "office_caltech10": ("amazon", "caltech10", "dslr", "webcam"),
}

RUNS: Mapping[str, tuple[int, str]] = {
    "digits": (15, "fbe0608e09f8f9f6"),
    "digits_tuning": (30, "d3703292529c7a29"),
    "memorization_cifar10": (15, "4475dc3db26ca73c"),
    "online_cifar10": (21, "b4d45b26b860c664"),
    "online_cifar10_tuning": (42, "db65c76a7b33112b"),
}
"""Studies of which records exist: how many runs, and SHA-256 of their hashes. They must be found again."""

PAPERS = ("digits", "digits_five", "fedws", "label_skew", "office", "office_small_batch")
"""Studies whose paper's numbers are known."""

every_recipe = pytest.mark.parametrize("name", recipe_names())


@cache
def study_of(name: str) -> Study:
    return read_study(find_study(name))


def covers(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return all(
        covers(value, config.get(key, {})) if isinstance(value, Mapping) else config.get(key) == value
        for key, value in wanted.items()
    )


@pytest.mark.few(3)
@every_recipe
def test_a_recipe_says_what_it_is_and_resolves(name: str) -> None:
    study = study_of(name)
    assert find_study(name).read_text(encoding="utf-8").startswith("# ")
    assert study.title != name
    assert study.about
    assert study.drafts()
    searched = {len(candidates) for candidates in study.searches}
    assert len(searched) <= 1, "every method chooses among as many"


@pytest.mark.few(12)
@every_recipe
def test_a_papers_numbers_belong_to_runs(name: str) -> None:
    study = study_of(name)
    drafts = [draft.to_dict() for draft in study.drafts()]
    cells = set()
    for entry in study.paper:
        matching = [draft for draft in drafts if covers(entry["match"], draft)]
        assert matching, entry
        assert 0 <= entry["value"] <= 1
        kind, _, domain = entry["score"].partition(".")
        assert kind in ("mean", "per_domain")
        assert domain in (DOMAINS[matching[0]["data"]["name"]] if kind == "per_domain" else ("",))
        assert "arXiv" in entry["source"] or "Rerun" in entry["source"]
        cells.add((json.dumps(entry["match"], sort_keys=True), entry["score"]))
    assert len(cells) == len(study.paper), "one number a method and score"


def test_the_papers_that_give_numbers_have_them() -> None:
    assert set(PAPERS) <= {name for name in recipe_names() if study_of(name).paper}


def test_office_numbers_are_whole_images_and_their_means() -> None:
    """Every accuracy on Office-Caltech-10 is a number of images over 192, 225, 32 or 59; a mean is of four of them."""
    images = {"amazon": 192, "caltech10": 225, "dslr": 32, "webcam": 59}
    checked = 0
    for name in ("office", "office_small_batch"):
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for entry in study_of(name).paper:
            key = json.dumps(entry["match"], sort_keys=True), entry["source"].split(";")[0]
            rows.setdefault(key, {})[entry["score"].removeprefix("per_domain.")] = entry["value"]
        for scores in (row for row in rows.values() if row.keys() >= images.keys()):
            for domain, count in images.items():
                hits = round(scores[domain] * count)
                assert hits / count == pytest.approx(scores[domain], abs=0.0006), (name, domain, scores)
            if "mean" in scores:
                assert sum(scores[domain] for domain in images) / 4 == pytest.approx(scores["mean"], abs=0.0006)
                checked += 1
    assert checked == 4  # three rows of FedWon, one of the rerun


@pytest.mark.parametrize("name", RUNS)
def test_runs_with_records_keep_their_hashes(name: str) -> None:
    hashes = [config.hash for config in study_of(name).configs]
    assert (len(hashes), hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]) == RUNS[name]


def test_streams_are_tuned_on_streams_that_are_held_back() -> None:
    for name in ("online_cifar100", "online_cifar10_derpp"):
        for config in study_of(name).search_configs:
            assert config.kind == "continual"
            assert (config.evaluate.split, config.data.validation) == ("validation", 0.05)


def test_the_best_five_norms_are_those_with_the_highest_validation_scores() -> None:
    """Of the summary of digits_norms, as digits_norms_best says: the better of both strategies counts."""
    summary = json.loads((SUMMARIES / "digits_norms.json").read_text(encoding="utf-8"))
    scores: dict[str, float] = {}
    for choice in summary["studies"][0]["selection"]["chosen"]:
        strategy, _, rest = choice["method"].partition(" + ")
        assert strategy in ("fedavg", "fedbn")
        norm = rest.split(",")[0] or "batch_norm"
        scores[norm] = max(scores.get(norm, 0.0), choice["score"])
    best = sorted(scores, key=lambda norm: -scores[norm])[:5]
    reported = {(draft.strategy.name, draft.norm.name) for draft in study_of("digits_norms_best").drafts()}
    assert reported == {(strategy, norm) for strategy in ("fedavg", "fedbn") for norm in (*best, "batch_norm")}
    assert {draft.seed for draft in study_of("digits_norms_best").drafts()} == {1, 2, 3}


def test_the_best_five_norms_of_the_stream_are_those_with_the_highest_validation_scores() -> None:
    summary = json.loads((SUMMARIES / "cifar10_norms.json").read_text(encoding="utf-8"))
    scores = {
        choice["method"].removeprefix("er_ace + ").split(",")[0]: choice["score"]
        for choice in summary["studies"][0]["selection"]["chosen"]
    }
    assert len(scores) == 31
    best = sorted(scores, key=lambda norm: -scores[norm])[:5]
    drafts = study_of("cifar10_norms_best").drafts()
    assert {draft.norm.name for draft in drafts} == set(best)
    assert {draft.seed for draft in drafts} == {1, 2, 3}


def test_the_first_looks_have_every_norm_that_their_network_takes() -> None:
    """What is left out there needs another network, or puts no layer and changes no weight of a plain one."""
    for name, model, others in (
        ("digits_norms", "digits_cnn", {"residual_scale", "task_balanced_norm"}),
        ("cifar10_norms", "resnet18", set[str]()),
    ):
        drafts = study_of(name).drafts()
        assert {draft.model.name for draft in drafts} == {model}
        taken = {card.name for card in NORMS if card.name in NORMS.built_in and not card.made().brings_attention}
        assert {draft.norm.name for draft in drafts} == taken - others - {"anfr"}  # not of the reading list
    attentions = {card.name for card in NORMS if card.made().brings_attention}
    assert attentions <= {draft.norm.name for draft in study_of("cifar10_norms_vit").drafts()}


def test_office_trains_on_62_images_while_it_chooses() -> None:
    """As FedBN's code holds 50 images back beside the 62 that it trains on."""
    for config in study_of("office_small_batch").search_configs:
        held = round(config.data.train_per_client * config.data.validation)
        assert (config.data.train_per_client - held, held) == (62, 50)


def test_a_study_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of that name is no study
    (tmp_path / "own").write_text("")
    assert find_study("digits") == RECIPES / "digits.toml"
    assert find_study("online-cifar10") == RECIPES / "online_cifar10.toml"
    assert find_study("own") == Path("own")
    with pytest.raises(ConfigError, match=r"no study file nowhere\.toml.*digits_tuning"):
        find_study("nowhere.toml")
    with pytest.raises(UnknownNameError, match=r"no study named 'ofice'.*Did you mean 'office'"):
        find_study("ofice")


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every federated run takes 60 seconds and every continual one 10, two at a time."""

    def seconds(config: Any) -> Estimate:
        if config.model.name == "mobilenet_v2":
            raise DataError("nobody knows")
        return Estimate(10.0 if config.kind == "continual" else 60.0, f"Counted in {config.data.dir or '-'}.")

    monkeypatch.setattr(command, "estimate_seconds", seconds)
    monkeypatch.setattr(command, "default_jobs", lambda: 2)


@pytest.mark.slow
@pytest.mark.usefixtures("hours")
def test_recipes_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    command.run_recipes(None, None, with_cost=True, as_json=True)
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in document["recipes"]}
    assert list(rows) == recipe_names()
    assert document["jobs"] == 2
    assert rows["digits"]["estimated_seconds"] == 15 * 60 / 2
    assert rows["office_small_batch"]["estimated_seconds"] == (30 + 15) * 60 / 2
    assert (rows["online_cifar100"]["runs"], rows["online_cifar100"]["selection_runs"]) == (42, 84)
    assert rows["office"]["paper"] == {"FedBN (arXiv 2102.07623)": 2, "Rerun of FedBN's code by others": 13}
    assert rows["label_skew"]["estimated_seconds"] is None
    assert rows["label_skew"]["basis"] == ["Not known: nobody knows"]


@pytest.mark.slow
@pytest.mark.usefixtures("hours")
def test_recipes_in_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command.run_recipes(None, Path("/data"), with_cost=True, as_json=False)
    captured = capsys.readouterr()
    for words in ("Digits, 5 to 50 clients", "15 of FedWon", "42 + 84", "8 min", "Counted in /data.", "nobody knows"):
        assert words in captured.out
    assert captured.err == ""


def test_recipes_are_listed_without_resolving_anything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("fednorm.study.grid.resolve", lambda _: pytest.fail("it resolved a run"))
    run_list()
    captured = capsys.readouterr()
    for words in ("Digits, 5 to 50 clients", "15 of FedWon", "42 + 84", "--cost", *recipe_names()):
        assert words in captured.out
    assert "estimated time" not in captured.out


@pytest.mark.few(4)
@every_recipe
def test_the_index_says_what_the_files_say(name: str) -> None:
    rows = {row["name"]: row for row in outlines()}
    assert list(rows) == recipe_names(), "run: python docs/make.py"
    assert rows[name] == command.outline(find_study(name)), "run: python docs/make.py"


@pytest.mark.few(2)
@every_recipe
def test_a_recipe_is_shown_whole(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command.run_recipes(name, None, with_cost=False, as_json=False)
    told, study = " ".join(capsys.readouterr().out.split()), study_of(name)
    for words in (study.title, " ".join(study.about.split()), f"Runs: {len(study.cases)}", f"fednorm compare {name}"):
        assert words in told
    for entry in study.paper:
        assert percent(entry["value"]) in told
    assert "Data: " in told


@pytest.mark.few(2)
@every_recipe
def test_compare_lists_a_recipes_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "estimate_seconds", lambda _: Estimate(1.0, "made up"))
    run_compare(
        name,
        data_dir=None,
        runs=None,
        jobs=1,
        settings=[],
        select_on_test=False,
        dry_run=True,
        markdown=False,
        as_json=True,
    )
    document = json.loads(capsys.readouterr().out)
    study = study_of(name)
    assert len(document["runs"]) == len(study.cases)
    assert len(document["selection_runs"]) == len(study.search_configs)
