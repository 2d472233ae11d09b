"""Studies: which runs a file stands for, how hyper-parameters are chosen, what is refused, what the manifest says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednorm.config import merge
from fednorm.errors import ConfigError, RecordError
from fednorm.records.integrity import unsealed
from fednorm.study import manifest
from fednorm.study.cases import Study
from fednorm.study.study import make_study, read_study

SEARCHED: dict[str, Any] = {
    "base": {"model": {"width": 4}, "rounds": {"num_rounds": 30}},
    "points": [
        {"strategy": {"name": "fedbn"}},
        {"strategy": {"name": "fedwon"}, "search": {"train": {"learning_rate": [0.1, 0.2], "agc": [0.1, 0.2]}}},
    ],
    "grid": {"seed": [1, 2, 3]},
    "search": {"train": {"learning_rate": [0.01, 0.02, 0.03, 0.04]}},
    "select": {"seed": 7, "data": {"validation": 0.2}, "rounds": {"num_rounds": 5}},
}


def searched(overrides: dict[str, Any] | None = None, *, select_on_test: bool = False, **tables: Any) -> Study:
    document = {key: value for key, value in {**SEARCHED, **tables}.items() if value is not None}
    return make_study(document, "digits", overrides, select_on_test=select_on_test)


def scored(study: Study, score: Callable[[Any], float]) -> dict[str, Any]:
    """Return results of the search as a run would give them, with scores of our own."""
    return {
        config.hash: {"hash": config.hash, "config": config.to_dict(), "final": {"mean": score(config)}}
        for config in study.search_configs
    }


def rates(study: Study, results: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (c.strategy.name, c.train.learning_rate, c.train.agc, c.seed)  # type: ignore[union-attr]
        for c in study.resolved(study.choices(results))
    ]


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_tables_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    spellings = (
        '[base]\n[grid]\nstrategy.name = ["fedavg", "fedbn"]\ndata.clients_per_domain = [1, 2]',
        '[base]\n[grid.strategy]\nname = ["fedavg", "fedbn"]\n[grid.data]\nclients_per_domain = [1, 2]',
        '[base]\n[grid]\nstrategy = {name = ["fedavg", "fedbn"]}\ndata = {clients_per_domain = [1, 2]}',
    )
    read = []
    for text in spellings:
        path.write_text(text)
        read.append(tuple(config.hash for config in read_study(path).configs))
    assert len(set(read)) == 1
    assert len(read[0]) == 4


def test_what_a_study_says_of_itself_is_kept_with_names_as_the_registries_spell_them() -> None:
    study = make_study(
        {
            "study": {"title": "T", "about": "A", "baseline": {"strategy": {"name": "FedAvg"}}},
            "base": {},
            "points": [{"strategy": {"name": "fedbn"}}, {}],
            "paper": [{"match": {"norm": {"name": "Batch-Norm"}}, "score": "mean", "value": 0.9, "source": "Table 1"}],
        },
        "stem",
    )
    assert (study.name, study.title, study.about) == ("stem", "T", "A")
    assert study.baseline == {"strategy": {"name": "fedavg"}}
    assert study.paper[0]["match"] == {"norm": {"name": "batch_norm"}}
    assert (study.search_configs, study.rule) == ((), "")
    assert len(study.configs) == 2
    assert make_study({"base": {}}, "stem").title == "stem"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, r"must have a \[base\] table.*got an empty file"),
        ({"bose": {}}, r"a table \[bose\] that no study has\. Did you mean 'base'\?"),
        ({"base": {}, "extra": {}}, r"a table \[extra\] that no study has"),
        ({"base": 3}, r"\[base\] is a table of keys; got base = 3"),
        ({"base": {}, "grid": 3}, r"\[grid\] is a table of keys; got grid = 3"),
        ({"base": {}, "grid": {}}, r"\[grid\] is empty\. Give it a list, e\.g\. seed = \[1, 2, 3\], or leave it out"),
        ({"base": {}, "search": {}}, r"\[search\] is empty"),
        ({"base": {}, "grid": {"train": {}}}, r"\[grid\] is empty"),
        ({"base": {}, "points": 3}, r"\[\[points\]\] are tables.*got 3"),
        ({"base": {}, "points": []}, r"\[\[points\]\] are tables.*got \[\]"),
        ({"base": {}, "points": [1]}, r"\[\[points\]\] are tables.*got \[1\]"),
        ({"base": {}, "grid": {"seed": []}}, r"grid\.seed must be a list of one value or more"),
        ({"base": {}, "points": [{}, {"seed": 1}]}, r"one and the same .*point 1 \(no key\); and point 2 \(seed = 1\)"),
        ({"base": {}, "study": {"titel": "x"}}, r"\[study\] has no key 'titel'\. Did you mean 'title'\?"),
        ({"base": {}, "study": {"title": 3}}, r"study\.title is a text; got 3"),
        ({"base": {}, "study": {"baseline": "fedavg"}}, r"study\.baseline is a table of keys; got 'fedavg'"),
        ({"base": {}, "study": {"baseline": {"strategi": {}}}}, r"no configuration key 'strategi'.*'strategy'"),
        (
            {"base": {}, "study": {"baseline": {"strategy": {"name": "fedbn"}}}},
            r"no run of the study is of its baseline \(strategy\.name = 'fedbn'\)",
        ),
        ({"base": {}, "select": {"seed": 1}}, r"has \[select\], which says how.*and no \[search\]"),
        (
            {"base": {}, "paper": [{"match": {}, "score": "mean", "value": "x"}]},
            r"number 1 of \[\[paper\]\] needs value",
        ),
        ({"base": {}, "paper": [{"match": {}, "score": "mean", "value": 1.0}]}, r"needs source, .*; got nothing"),
        ({"base": {}, "paper": [{"scores": "mean"}]}, r"has no key 'scores'\. Did you mean 'score'\?"),
        (
            {"base": {}, "paper": [{"match": {"trian": {}}, "score": "m", "value": 1, "source": "s"}]},
            r"'trian'\. Did you mean 'train'",
        ),
    ],
)
def test_a_file_that_is_no_study_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_study(document)


def test_what_is_set_for_one_call_may_leave_the_baseline_out() -> None:
    document = {
        "study": {"baseline": {"strategy": {"name": "fedavg"}}},
        "base": {},
        "grid": {"strategy": {"name": ["fedavg", "fedbn"]}},
    }
    assert len(make_study(document, overrides={"strategy": {"name": "fedbn"}}).configs) == 1


# Choosing -------------------------------------------------------------------------------------------------------------


def test_every_method_chooses_from_its_space_on_validation_images_and_reports_on_test_images() -> None:
    study = searched()
    assert study.configs == ()
    runs = study.search_configs
    assert [(c.strategy.name, c.train.learning_rate, c.train.agc) for c in runs] == [  # type: ignore[union-attr]
        *(("fedbn", rate, 0.0) for rate in (0.01, 0.02, 0.03, 0.04)),
        *(("fedwon", rate, agc) for rate in (0.1, 0.2) for agc in (0.1, 0.2)),
    ]
    assert {(c.evaluate.split, c.data.validation, c.seed) for c in runs} == {("validation", 0.2, 7)}
    assert {c.rounds.num_rounds for c in runs} == {5}  # type: ignore[union-attr]

    best = {"fedbn": (0.03, 0.0), "fedwon": (0.2, 0.1)}
    results = scored(study, lambda c: float((c.train.learning_rate, c.train.agc) == best[c.strategy.name]))
    assert rates(study, results) == [(name, *best[name], seed) for name in ("fedbn", "fedwon") for seed in (1, 2, 3)]
    final = study.resolved(study.choices(results))
    assert {(c.evaluate.split, c.data.validation) for c in final} == {("test", 0.0)}
    assert {c.rounds.num_rounds for c in final} == {30}  # type: ignore[union-attr]
    assert study.rule == "Chosen by the mean validation accuracy over domains."
    assert study.split == "validation"
    chosen = study.choices(results)
    assert [(c.label, c.score, results[c.run]["final"]["mean"]) for c in chosen] == [("fedbn", 1, 1), ("fedwon", 1, 1)]


def test_a_method_is_a_point_with_its_values_of_the_grid_unless_the_selection_fixes_them() -> None:
    grid = {"seed": [1, 2], "train": {"batch_size": [8, 16]}}
    study = searched(points=None, grid=grid)
    assert len(study.search_configs) == 2 * 4
    results = scored(study, lambda c: -abs(c.train.learning_rate - c.train.batch_size / 800))
    assert [(c.train.batch_size, c.train.learning_rate) for c in study.resolved(study.choices(results))] == [
        (8, 0.01),
        (16, 0.02),
        (8, 0.01),
        (16, 0.02),
    ]
    once = searched(points=None, grid=grid, select=merge(SEARCHED["select"], {"train": {"batch_size": 4}}))
    assert [c.train.batch_size for c in once.search_configs] == [4] * 4
    assert len(once.resolved(once.choices(scored(once, lambda _: 0.5)))) == 4


def test_a_search_of_several_tables_is_their_combinations() -> None:
    tables = [
        {"train": {"agc": [0.1, 0.2], "learning_rate": [0.1]}},
        {"train": {"agc": [0.3], "learning_rate": [1.0, 2.0]}},
    ]
    study = searched(points=[{}, {"strategy": {"name": "fedwon"}, "search": tables}])
    pairs = [(c.train.agc, c.train.learning_rate) for c in study.search_configs[4:]]
    assert pairs == [(0.1, 0.1), (0.2, 0.1), (0.3, 1.0), (0.3, 2.0)]


def test_a_configuration_is_judged_by_the_mean_over_the_seeds_of_the_search() -> None:
    study = searched(points=None, search={"train": {"learning_rate": [0.1, 0.2]}}, select=merge(
        SEARCHED["select"], {"seed": [1, 2]}
    ))  # fmt: skip
    scores = {(0.1, 1): 0.9, (0.1, 2): 0.1, (0.2, 1): 0.6, (0.2, 2): 0.6}
    (choice,) = study.choices(scored(study, lambda c: scores[c.train.learning_rate, c.seed]))
    assert (choice.keys, choice.score) == ({("train", "learning_rate"): 0.2}, 0.6)


def test_the_seed_that_is_set_leaves_the_choice_alone_and_other_keys_do_not() -> None:
    study = searched()
    assert {c.hash for c in searched({"seed": 5}).search_configs} == {c.hash for c in study.search_configs}
    assert {c.seed for c in searched({"seed": 5}).drafts()} == {5}
    assert {c.seed for c in searched({"select": {"seed": 9}}).search_configs} == {9}
    with pytest.raises(ConfigError, match="select is a table: set its keys"):
        searched({"select": 3})
    other = searched({"data": {"train_per_client": 3}, "train": {"learning_rate": 0.5, "agc": 0.0}})
    assert {c.data.train_per_client for c in other.search_configs} == {3}
    assert {c.train.learning_rate for c in (*other.search_configs, *other.drafts())} == {0.5}


def test_a_key_that_is_set_can_make_budgets_differ() -> None:
    with pytest.raises(ConfigError, match="there are 1 for fedbn, 2 for fedwon"):
        searched({"train": {"learning_rate": 0.5, "agc": 0.1}}, points=[
            SEARCHED["points"][0],
            {"strategy": {"name": "fedwon"}, "search": {"norm": {"activation_gain": [True, False]}}},
        ])  # fmt: skip


def test_a_method_waits_for_missing_scores_and_passes_over_those_that_broke_down() -> None:
    study = searched()
    results = scored(study, lambda c: c.train.learning_rate)
    broken = study.search_configs[3].hash  # the best of FedBN's
    del results[broken]
    assert [choice.label for choice in study.choices(results)] == ["fedwon"]
    assert [c.strategy.name for c in study.resolved(study.choices(results))] == ["fedwon"] * 3  # type: ignore[union-attr]
    assert study.choices(results, {broken})[0].keys == {("train", "learning_rate"): 0.03}
    assert [choice.label for choice in study.choices(results, {c.hash for c in study.search_configs[:4]})] == ["fedwon"]


def test_test_images_choose_only_where_the_caller_says_so() -> None:
    select = {"seed": 7}
    with pytest.raises(ConfigError, match=r"scored on validation images, and none are held back.*--select-on-test"):
        searched(select=select)
    with pytest.raises(ConfigError, match=r"asks in \[select\] for evaluate\.split = 'test'.*takes --select-on-test"):
        searched(select=merge(SEARCHED["select"], {"evaluate": {"split": "test"}}))
    with pytest.raises(ConfigError, match=r"has a search, so its runs are reported on test images"):
        searched(base=merge(SEARCHED["base"], {"evaluate": {"split": "validation"}, "data": {"validation": 0.2}}))
    with pytest.raises(ConfigError, match="there is nothing to select"):
        make_study({"base": {}}, select_on_test=True)
    study = searched(select=select, select_on_test=True)
    assert {c.evaluate.split for c in study.search_configs} == {"test"}
    assert study.split == "test"
    assert study.rule.startswith("Chosen by the mean test accuracy over domains (--select-on-test): the test numbers")


def test_methods_must_have_equal_budgets() -> None:
    with pytest.raises(ConfigError, match=r"there are 4 for fedbn, agc 0, 3 for fedwon, agc 0\.64"):
        searched(points=[
            SEARCHED["points"][0],
            {"strategy": {"name": "fedwon"}, "search": {"train": {"learning_rate": [0.1, 0.2, 0.3]}}},
        ])  # fmt: skip
    with pytest.raises(ConfigError, match="there are 1 for fedbn, 4 for fedwon"):
        searched(search=None)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"grid": {"train": {"learning_rate": [1.0]}}}, r"has train\.learning_rate in \[grid\] and in a search"),
        ({"points": [{"search": 3}]}, "a point's search is a table of lists, or several of them; got 3"),
        ({"search": {"train": {"learning_rate": 0.1}}}, r"search\.train\.learning_rate must be a list"),
        ({"search": {"train": {"learnin_rate": [0.1]}}, "points": None}, "Did you mean 'learning_rate'"),
        ({"points": [{}, {"rounds": {"num_rounds": 3}}]}, r"one and the same.*\(search, seed 7\)"),
        ({"select": {"seed": [1, 1]}}, r"select\.seed names 1 twice"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        searched(**tables)


STREAM = {"kind": "continual", "learner": {"name": "er_ace"}}


def test_streams_choose_on_validation_images_and_memorization_by_plasticity() -> None:
    study = searched(base=STREAM, points=None, select={"data": {"validation": 0.1}})
    assert {c.evaluate.split for c in study.search_configs} == {"validation"}
    assert study.rule.startswith("Chosen by the average accuracy on validation images")
    with pytest.raises(ConfigError, match=r"evaluate\.experiences is 'current'"):
        searched(
            base={**STREAM, "evaluate": {"experiences": "current"}}, points=None, select={"data": {"validation": 0.1}}
        )

    base = {"kind": "continual", "scenario": {"name": "random-labels"}, "learner": {"name": "naive"}}
    memory = searched(base=base, points=None, select={"seed": 1}, grid={"seed": [1, 2]})
    assert memory.split == "training"
    assert "plasticity" in memory.rule
    results = {
        c.hash: {
            **{"hash": c.hash, "config": c.to_dict(), "data": {"memorization": True}},
            "final": {"plasticity": 1 - c.train.learning_rate},
        }
        for c in memory.search_configs
    }
    final = memory.resolved(memory.choices(results))
    assert [c.train.learning_rate for c in final] == [0.01, 0.01]
    assert final[0].hash in results  # the run it was chosen by is the run of that seed


# The manifest ---------------------------------------------------------------------------------------------------------


def test_the_manifest_tells_of_the_study_from_the_first_moment_and_unites_its_calls(tmp_path: Path) -> None:
    study = searched({"seed": 1})
    first = manifest.update(tmp_path / "runs", study, (), ())
    assert unsealed(json.loads((tmp_path / "runs" / "study.json").read_text())) == first
    assert manifest.read(tmp_path / "runs") == first
    assert (first["format"], first["study"], first["title"], first["runs"]) == (2, "digits", "digits", [])
    assert first["selection_runs"] == [config.hash for config in study.search_configs]
    assert first["selection"] == {
        "rule": "Chosen by the mean validation accuracy over domains.",
        "split": "validation",
        "configurations": 4,
        "chosen": [],
        "diverged": {},
    }
    results = scored(study, lambda c: c.train.learning_rate)
    runs = []
    for seed in (1, 2):
        study = searched({"seed": seed})
        choices = study.choices(results)
        runs += [config.hash for config in study.resolved(choices)]
        last = manifest.update(tmp_path / "runs", study, choices, study.resolved(choices), {"abc": "why"})
    assert last["runs"] == runs
    assert len(runs) == 4
    assert last["selection_runs"] == first["selection_runs"]
    assert last["selection"]["diverged"] == {"abc": "why"}
    assert last["selection"]["chosen"] == [
        {
            **{"method": "fedbn", "keys": {"train.learning_rate": 0.04}, "score": 0.04},
            "run": study.search_configs[3].hash,
        },
        {
            **{"method": "fedwon", "keys": {"train.learning_rate": 0.2, "train.agc": 0.1}, "score": 0.2},
            "run": study.search_configs[6].hash,
        },
    ]
    assert manifest.update(tmp_path / "runs", study, (), ())["selection"]["chosen"] == last["selection"]["chosen"]


def test_a_search_that_is_widened_and_chooses_otherwise_takes_back_what_it_chose(tmp_path: Path) -> None:
    """Else a method had two rows: what it once chose, and what it chooses now. Of another seed both calls stand."""
    made = []
    for rates in ([0.01, 0.03], [0.003, 0.01, 0.03]):
        study = make_study(
            {
                "base": {"data": {"validation": 0.2}},
                "grid": {"seed": [1, 2]},
                "search": {"train": {"learning_rate": rates}},
                "select": {"seed": 1},
            }
        )
        choices = study.choices(scored(study, lambda c: 1 - c.train.learning_rate))
        made.append(study.resolved(choices))
        last = manifest.update(tmp_path, study, choices, made[-1])
    assert [config.train.learning_rate for run in made for config in run] == [0.01, 0.01, 0.003, 0.003]
    assert last["runs"] == [config.hash for config in made[1]]
    assert [one["keys"] for one in last["selection"]["chosen"]] == [{"train.learning_rate": 0.003}]
    assert len(last["selection_runs"]) == 3


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    manifest.update(tmp_path, searched(), (), ())
    with pytest.raises(ConfigError, match=r"holds the study 'digits', and this is 'other'.*--out"):
        manifest.update(tmp_path, make_study({"base": {}}, "other"), (), ())
    with pytest.raises(ConfigError, match="were chosen on validation images, and these would be chosen on test images"):
        manifest.update(tmp_path, searched(select_on_test=True), (), ())
    whole = (tmp_path / "study.json").read_text()
    for text in (
        "{",
        "[]",
        "{}",
        '{"format": 3}',
        whole.replace('"format": 2', '"format": 1'),
        whole.replace("4", "5"),
    ):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(RecordError, match=r"study\.json does not tell which study this folder holds: .*remove it"):
            manifest.update(tmp_path, searched(), (), ())
    (tmp_path / "study.json").unlink()
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"Cannot write .*study\.json: .*--out"):
        manifest.update(tmp_path / "file", searched(), (), ())
