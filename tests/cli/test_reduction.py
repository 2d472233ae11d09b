"""A smaller study of the same shape: what is scaled, what stays, and that everything says so; departures by --set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.report.comparison import comparison_table, comparisons, paper_table
from fednorm.report.verdict import verdict
from fednorm.study import manifest
from fednorm.study.recipes import find_study, recipe_names
from fednorm.study.reduction import reduction
from fednorm.study.study import make_study, read_study

FEDERATED: dict[str, Any] = {
    "rounds": {"num_rounds": 100, "evaluate_every": 10},
    "data": {"train_per_client": 743, "clients_per_domain": 10},
    "train": {"linear_probe_rounds": 95},
}


def test_rounds_images_and_clients_are_scaled_no_lower_than_their_floors() -> None:
    assert reduction(resolve(FEDERATED), 0.1) == {
        "rounds": {"num_rounds": 10, "evaluate_every": 1},
        "data": {"train_per_client": 74, "clients_per_domain": 2, "test_per_domain": 500},  # 0.1 of "all", 5,000
        "train": {"linear_probe_rounds": 9},  # below the rounds
    }
    less = reduction(resolve({"rounds": {"num_rounds": 1}, "data": {"train_per_client": 20}}), 0.01)
    assert less == {"data": {"test_per_domain": 50}}  # what is below a floor stays


def test_a_stream_s_passes_images_and_memory_are_scaled() -> None:
    stream = {"kind": "continual", "scenario": {"name": "split_digits"}, "learner": {"name": "er_ace"}}
    assert reduction(resolve({**stream, "train": {"epochs": 20}}), 0.25) == {
        "train": {"epochs": 5},
        "scenario": {"train_per_experience": 1250, "test_per_experience": 1250},
        "learner": {"memory_size": 125},
    }
    labels = {"name": "random_labels", "num_experiences": 40, "train_per_experience": 1280}
    less = reduction(resolve({**stream, "scenario": labels, "learner": {"name": "naive"}}), 0.1)
    assert less["scenario"] == {"num_experiences": 4, "train_per_experience": 128}


SEARCHING = ("online_cifar100", "online_cifar10_derpp", "digits_norms")
"""Studies of more than a hundred runs, which take seconds to read."""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SEARCHING else n for n in recipe_names()]
)
def test_every_recipe_can_be_reduced(name: str) -> None:
    whole, less = read_study(find_study(name)), read_study(find_study(name), reduce=0.1)
    assert less.title == f"{whole.title} (reduced to 0.1)"
    assert len(less.cases) == len(whole.cases)
    assert len(less.search_configs) == len(whole.search_configs)
    drafts, originals = less.drafts(), whole.drafts()
    assert len({config.hash for config in drafts}) == len(drafts)
    assert not {config.hash for config in drafts} & {config.hash for config in originals}
    for own, original in zip(drafts, originals, strict=True):
        assert (own.seed, own.model.to_dict(), own.norm.to_dict()) == (
            original.seed,
            original.model.to_dict(),
            original.norm.to_dict(),
        )


STUDY: dict[str, Any] = {
    "study": {"baseline": {"strategy": {"name": "fedavg"}}},
    "base": {
        "data": {"train_per_client": 100, "test_per_domain": 400, "image_size": 16},
        "rounds": {"num_rounds": 20},
        "model": {"width": 4},
    },
    "grid": {"strategy": {"name": ["fedavg", "fedbn"]}, "data": {"clients_per_domain": [1, 4]}, "seed": [1]},
    "paper": [{"match": {"strategy": {"name": "fedbn"}}, "score": "mean", "value": 0.7, "source": "A paper, table 1"}],
}


def test_what_the_grid_varies_and_what_is_set_stays() -> None:
    study = make_study(STUDY, overrides={"rounds": {"num_rounds": 5}}, reduce=0.5)
    assert [config.data.clients_per_domain for config in study.configs] == [1, 4, 1, 4]
    assert {config.rounds.num_rounds for config in study.configs} == {5}
    assert {config.data.train_per_client for config in study.configs} == {50}


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0, -0.1])
def test_a_factor_that_reduces_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="--reduce is a factor between 0 and 1"):
        make_study(STUDY, reduce=factor)


def results_of(study: Any, score: float) -> list[dict[str, Any]]:
    """Return results as runs of a study would leave them, all with one accuracy."""
    return [
        {
            **{"kind": "federated", "hash": config.hash, "config": config.to_dict(), "evaluation": {}, "rounds": []},
            "final": {"mean": score, "worst": score, "per_domain": {}, "round": config.rounds.num_rounds},
            "data": {"title": "digits", "notes": []},
            "seconds": 1.0,
        }
        for config in study.configs
    ]


def test_beside_the_paper_a_departure_is_marked_and_named(tmp_path: Path) -> None:
    study = make_study(STUDY, overrides={"data": {"image_size": 8, "dir": "somewhere"}, "seed": 3})
    document = manifest.update(tmp_path, study, (), study.configs)
    assert set(document["departs"]) == {config.hash for config in study.configs}
    assert next(iter(document["departs"].values())) == {"data.image_size": [8, 16]}
    (comparison,) = comparisons(results_of(study, 0.171), studies=[document])
    table = comparison_table(comparison)
    cells = {row[0]: row[-1] for row in table.rows}
    assert cells["fedbn data.clients_per_domain 1"] == "−52.9*"
    note = "Departs from the study; beside the paper: *: data.image_size 8, not 16."
    assert note in table.warnings
    assert note in table.notes
    papers = paper_table(comparison)
    assert papers is not None
    assert papers.rows[0][1] == "17.1 (70.0, −52.9*)"
    assert "52.9 below the paper, from whose protocol it departs (data.image_size)" in verdict(comparison)


def test_a_study_as_it_is_departs_from_nothing(tmp_path: Path) -> None:
    study = make_study(STUDY, overrides={"data": {"dir": "somewhere"}, "device": "cpu"})
    document = manifest.update(tmp_path, study, (), study.configs)
    assert document["departs"] == {}
    (comparison,) = comparisons(results_of(study, 0.171), studies=[document])
    assert {row[-1] for row in comparison_table(comparison).rows} == {"–", "−52.9"}


def test_a_reduced_study_says_so_everywhere(tmp_path: Path) -> None:
    study = make_study(STUDY, reduce=0.1)
    document = manifest.update(tmp_path, study, (), study.configs)
    assert document["reduced"] == 0.1
    assert document["study"] == "study (reduced to 0.1)"  # never in one folder with the whole one
    (comparison,) = comparisons(results_of(study, 0.171), studies=[document])
    assert comparison.title == "digits, reduced to 0.1 of the study"
    assert verdict(comparison).endswith("; reduced to 0.1 of the study")
    warnings = comparison_table(comparison).warnings
    assert "Reduced to 0.1 by --reduce, to look at it." in warnings
    assert any("rounds.num_rounds 2, not 20" in text for text in warnings)
    with pytest.raises(ConfigError, match="holds the study 'study"):
        manifest.update(tmp_path, make_study(STUDY), (), [])


def test_a_chosen_rate_is_no_departure() -> None:
    searched = {**STUDY, "search": {"train": {"learning_rate": [0.1, 0.3]}}, "select": {"data": {"validation": 0.2}}}
    study = make_study(searched, reduce=0.5)
    assert {config.train.learning_rate for config in study.search_configs} == {0.1, 0.3}
    (keys, *_) = study.departures(study.first_choices()).values()
    assert keys == {
        "data.train_per_client": [50, 100],
        "data.test_per_domain": [200, 400],
        "rounds.num_rounds": [10, 20],
    }


def test_the_command_line_reduces(call: Callable[..., Any]) -> None:
    whole = call("recipes", "office_small", "--reduce", "0.1")
    assert "Reduced to 0.1, to look at it: not the study" in whole.out
    assert "rounds.num_rounds 10 (100)" in whole.out
    assert "fednorm compare office_small --reduce 0.1 --data-dir DIR" in whole.out
    document = json.loads(call("recipes", "office_small", "--reduce", "0.1", "--json").out)
    assert document["recipes"][0]["reduced"] == 0.1
    outcome = call("compare", "office_small", "--reduce", "2")
    assert (outcome.code, "between 0 and 1" in outcome.err) == (2, True)
