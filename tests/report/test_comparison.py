"""Comparisons of results written by hand: every number known beforehand, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fednorm.config import merge, resolve
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.report._common import Table
from fednorm.report.comparison import (
    Comparison,
    Method,
    comparison_table,
    comparisons,
    kind_of,
    matches,
    paper_table,
    score_of,
    scored_on,
)

Make = Callable[..., dict[str, Any]]

RECORDS = sorted((Path(__file__).resolve().parents[2] / ".records").glob("*.json"))
T_975_2 = 4.30265272974946
"""The 97.5 % quantile of Student's t with two degrees of freedom, from a printed table."""


def federated(
    per_domain: Mapping[str, float | None] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    final: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    title: str = "digits (a, b)",
    **sections: Any,
) -> dict[str, Any]:
    """Return the result of a federated run; keywords are sections of its configuration."""
    scores = {"a": 0.8, "b": 0.6} if per_domain is None else dict(per_domain)
    resolved = resolve(merge(merge({"norm": {"name": "batch_norm"}}, config or {}), sections))
    plain = resolved.to_dict()
    known = [score for score in scores.values() if score is not None]
    return {
        "kind": "federated",
        "hash": resolved.hash,
        "config": plain,
        "norm": {"num_groups": 2, **plain["norm"]},
        "strategy": plain["strategy"],
        "data": {"title": title, "notes": [], "clients": [], **(data or {})},
        "rounds": [{"round": 10, "mean": 0.5, "bytes_down": 1, "bytes_up": 1}],
        "evaluation": {"own": {}},
        "final": {
            "per_domain": scores,
            "mean": sum(known) / len(known),
            "worst": min(known),
            "round": 10,
            "selection": f"last round, {plain['evaluate']['split']} images",
            **(final or {}),
        },
        "seconds": 1.0,
    }


def fed(strategy: str, by_seed: Sequence[float], **arguments: Any) -> list[dict[str, Any]]:
    """Return runs of a strategy, one a seed from 1; domain b scores 0.2 below domain a."""
    return [
        federated({"a": score + 0.1, "b": score - 0.1}, strategy={"name": strategy}, seed=seed, **arguments)
        for seed, score in enumerate(by_seed, start=1)
    ]


def study_of(results: Sequence[Mapping[str, Any]], **keys: Any) -> dict[str, Any]:
    manifest = {"format": 1, "study": "small", "title": "Small", "about": "", "baseline": None, "paper": []}
    runs = {"selection": None, "runs": [result["hash"] for result in results], "selection_runs": []}
    return {**manifest, **runs, **keys}


def only(results: Sequence[Mapping[str, Any]], **options: Any) -> Comparison:
    (comparison,) = comparisons(results, **options)
    return comparison


def method(comparison: Comparison, label: str) -> Method:
    (found,) = (method for method in comparison.methods if method.label == label)
    return found


def cells(table: Table | None, label: str) -> dict[str, str]:
    assert table is not None
    (row,) = (row for row in table.rows if row[0] == label)
    return dict(zip(table.columns, row, strict=True))


def test_a_comparison_worked_by_hand() -> None:
    results = [*fed("fedavg", [0.50, 0.60, 0.70]), *fed("fedbn", [0.53, 0.66, 0.70])]
    comparison = only(results, baseline="fedavg")
    assert (comparison.title, comparison.kind, comparison.headline) == ("digits (a, b)", "federated", "mean")
    assert (comparison.split, comparison.baseline, comparison.baselines) == ("test", "fedavg", ("fedavg",))
    assert [score.key for score in comparison.scores] == ["mean", "worst", "per_domain.a", "per_domain.b"]
    bn = method(comparison, "fedbn")
    std = math.sqrt((0.1**2 + 0.03**2 + 0.07**2) / 2)
    half = T_975_2 * std / math.sqrt(3)
    mean = bn.scores["mean"]
    assert [mean.mean, mean.std, mean.low, mean.high] == pytest.approx([0.63, std, 0.63 - half, 0.63 + half])
    assert bn.scores["worst"].mean == pytest.approx(0.53)
    assert bn.scores["per_domain.a"].mean == pytest.approx(0.73)
    difference = bn.differences["mean"]
    half = T_975_2 * 0.03 / math.sqrt(3)
    assert [difference.mean, difference.low, difference.high] == pytest.approx([0.03, 0.03 - half, 0.03 + half])
    assert (difference.n, difference.better, difference.worse) == (3, 2, 0)
    assert (bn.rank, bn.baseline) == (1.0, "fedavg")
    assert [result["config"]["seed"] for result in bn.results] == [1, 2, 3]
    base = method(comparison, "fedavg")
    assert (base.rank, base.differences, base.baseline) == (2.0, {}, None)


def test_the_table_of_a_comparison() -> None:
    results = [*fed("fedavg", [0.50, 0.60, 0.70]), *fed("fedbn", [0.53, 0.66, 0.70])]
    table = comparison_table(only(results, baseline="fedavg"))
    assert table.title == "Comparison (%): digits (a, b)"
    assert cells(table, "fedbn") == {
        "method": "fedbn",
        "mean accuracy": "63.0",
        "± sd": "± 8.9",
        "95 % interval": "[40.9, 85.1]",
        "n": "3",
        "difference": "+3.0 [−4.5, 10.5], 2 of 3 seeds better",
        "worst domain": "53.0",
        "rank": "1.0",
    }
    assert cells(table, "fedavg")["difference"] == "baseline"
    assert table.notes == (
        "Seeds 1, 2, 3 (n = 3 seeds). Standard deviation with n − 1; 95 % interval of the mean: Student's t.",
        "Scored after round 10 (last round, test images).",
        "Difference: to fedavg, paired by seed; mean, interval, and seeds in which the method is better.",
        "Rank: mean over domains of the method's rank in each, 1 is best, ties share.",
    )


def test_one_seed_has_no_interval_and_the_caption_says_so() -> None:
    table = comparison_table(only([*fed("fedavg", [0.5]), *fed("fedbn", [0.6])], baseline="fedavg"))
    assert table.columns == ("method", "mean accuracy", "n", "difference", "worst domain", "rank")
    assert cells(table, "fedbn")["difference"] == "+10.0"
    assert table.notes[0] == "Seed 1 (n = 1): one seed a method, so no deviation and no interval."


def test_methods_with_fewer_seeds_show_their_n() -> None:
    results = [*fed("fedavg", [0.5]), *fed("fedbn", [0.6, 0.7])]
    table = comparison_table(only(results, baseline="fedavg"))
    assert table.notes[0].startswith("Seeds 1, 2 (n = 1 to 2 seeds). ")
    assert table.notes[0].endswith("Student's t; none for one seed.")
    assert (cells(table, "fedavg")["95 % interval"], cells(table, "fedavg")["n"]) == ("–", "1")
    assert cells(table, "fedbn")["difference"] == "+10.0 (one seed)"


def test_equal_seeds_have_an_interval_of_no_width() -> None:
    found = only(fed("fedavg", [0.5, 0.5, 0.5])).methods[0].scores["mean"]
    assert (found.std, found.low, found.high) == (0.0, 0.5, 0.5)


def test_a_bootstrap_is_named_and_its_weakness_told() -> None:
    comparison = only([*fed("fedavg", [0.5, 0.6]), *fed("fedbn", [0.6, 0.8])], baseline="fedavg", interval="bootstrap")
    assert "percentile bootstrap (9,999 resamples; too short for so few seeds)" in comparison.caption[0]
    assert method(comparison, "fedbn").scores["mean"].method == "bootstrap"
    assert method(comparison, "fedbn").differences["mean"].method == "bootstrap"
    assert comparison == only(
        [*fed("fedbn", [0.6, 0.8])[::-1], *fed("fedavg", [0.5, 0.6])][::-1], baseline="fedavg", interval="bootstrap"
    )
    with pytest.raises(ConfigError, match="by t or bootstrap; got 'bayes'"):
        only(fed("fedavg", [0.5]), interval="bayes")


@pytest.mark.parametrize("odd", [None, math.nan, math.inf])
def test_runs_without_a_finite_score_are_left_out_and_counted(odd: float | None) -> None:
    results = [*fed("fedavg", [0.5, 0.6, 0.7]), *fed("fedbn", [0.6, 0.7, 0.8])]
    results[1]["final"]["mean"] = odd
    comparison = only(results, baseline="fedavg")
    assert method(comparison, "fedavg").scores["mean"].n == 2
    assert method(comparison, "fedavg").scores["mean"].mean == pytest.approx(0.6)
    assert method(comparison, "fedavg").scores["worst"].n == 3
    assert method(comparison, "fedbn").differences["mean"].n == 2
    table = comparison_table(comparison)
    assert "Runs left out, their score not measured or not finite: fedavg: 1 of 3." in table.notes
    assert cells(table, "fedavg")["n"] == "2"
    assert "nan" not in table.markdown()


def test_a_method_that_never_scored_has_a_row_of_dashes() -> None:
    comparison = only([*fed("fedavg", [0.5]), *fed("fedbn", [0.5], final={"mean": None, "worst": None})])
    assert cells(comparison_table(comparison), "fedbn")["mean accuracy"] == "–"
    assert cells(comparison_table(comparison), "fedbn")["n"] == "0"
    assert "mean" not in method(comparison, "fedbn").scores


def test_ranks_are_over_the_domains_that_all_have() -> None:
    results = [
        federated({"a": 0.9, "b": 0.2, "c": 0.5}, strategy={"name": "fedavg"}),
        federated({"a": 0.8, "b": 0.3, "c": 0.5}, strategy={"name": "fedbn"}),
        federated({"a": 0.7, "b": 0.1, "c": 0.4, "d": 1.0}, strategy={"name": "silobn"}),
    ]
    ranks = {found.label: found.rank for found in only(results).methods}
    assert ranks == {"fedavg": pytest.approx(4.5 / 3), "fedbn": pytest.approx(4.5 / 3), "silobn": 3.0}
    assert [found.rank for found in only(results[:1]).methods] == [None]
    alone = [federated({"a": 0.5}, strategy={"name": name}) for name in ("fedavg", "fedbn")]
    assert [found.rank for found in only(alone).methods] == [None, None]


def test_kinds_titles_and_splits_stand_apart(stream_result: Make) -> None:
    results = [
        federated(),
        federated(title="office"),
        federated(evaluate={"split": "validation"}, data={"validation": 0.2}),
        stream_result(),
    ]
    results[1]["hash"] = "another"
    found = comparisons(results)
    assert [(one.title, one.kind, one.split) for one in found] == [
        ("digits (a, b)", "federated", "test"),
        ("office", "federated", "test"),
        ("digits (a, b), validation images", "federated", "validation"),
        ("Split CIFAR-10 (5×2)", "continual", "test"),
    ]
    assert comparisons([]) == []


def test_scores_of_a_stream_and_their_directions(stream_result: Make) -> None:
    base = [stream_result(config={"seed": seed}) for seed in (1, 2)]
    other = [
        stream_result(
            config={"seed": seed},
            norm={"name": "group_norm"},
            final={"average_accuracy": 0.5, "forgetting_max_minus_last": 0.15, "drift": None},
        )
        for seed in (1, 2)
    ]
    comparison = only([*base, *other], baseline="er_ace + batch_norm")
    assert comparison.headline == "average_accuracy"
    told = {score.key: (score.percent, score.better) for score in comparison.scores}
    assert told["average_accuracy"] == (True, 1)
    assert told["forgetting_max_minus_last"] == (True, -1)
    assert told["drift"] == (False, 0)
    group = method(comparison, "er_ace + group_norm")
    assert (group.differences["average_accuracy"].better, group.differences["average_accuracy"].worse) == (0, 2)
    assert group.differences["forgetting_max_minus_last"].better == 2
    assert group.differences["forgetting_max_minus_last"].mean == pytest.approx(-0.10)
    assert "drift" not in group.scores
    assert "drift" not in group.differences
    assert group.rank is None


def test_a_memorization_stream_is_headed_by_plasticity(memorized: Make) -> None:
    results = [memorized([0.9, 0.8], final={"plasticity": 0.8, "average_accuracy": None})]
    comparison = only(results)
    assert comparison.headline == "plasticity"
    assert comparison_table(comparison).columns == ("method", "plasticity", "n")
    assert "Scored on training images, because there is nothing to hold out on this stream." in comparison.caption


def test_the_study_names_the_baseline() -> None:
    results = [*fed("fedavg", [0.5, 0.6]), *fed("fedbn", [0.6, 0.7])]
    study = study_of(results, baseline={"strategy": {"name": "FedAvg"}})
    assert only(results, studies=[study]).baseline == "fedavg"
    assert only(results, studies=[study], baseline="fedbn").baseline == "fedbn"
    assert only(results, studies=[{**study, "runs": ["of others"]}]).baseline is None
    strange = study_of(results, baseline={"strategy": {"name": "fedprox"}})
    comparison = only(results, studies=[strange])
    assert comparison.baseline is None
    assert (
        'No difference is shown: no method here is the study\'s baseline, {"strategy": {"name": "fedprox"}}.'
        in comparison.caption
    )


def test_each_batch_size_is_compared_with_its_own_baseline() -> None:
    results = [
        run
        for size, gain in ((1, 0.1), (32, 0.01))
        for name, score in (("fedavg", 0.5), ("fedbn", 0.5 + gain))
        for run in fed(name, [score, score], train={"batch_size": size})
    ]
    comparison = only(results, studies=[study_of(results, baseline={"strategy": {"name": "fedavg"}})])
    assert comparison.baseline == "fedavg"
    assert len(comparison.baselines) == 2
    found = {m.label: (m.baseline, m.differences["mean"].mean) for m in comparison.methods if m.differences}
    assert found == {
        "fedbn train.batch_size 1": ("fedavg train.batch_size 1", pytest.approx(0.1)),
        "fedbn train.batch_size 32": ("fedavg train.batch_size 32", pytest.approx(0.01)),
    }
    assert any("the one that shares most settings" in text for text in comparison.caption)
    assert cells(comparison_table(comparison), "fedavg train.batch_size 1")["difference"] == "baseline"


def test_where_two_baselines_are_as_near_nothing_is_guessed() -> None:
    results = [
        *fed("fedavg", [0.5], train={"batch_size": 1}),
        *fed("fedavg", [0.5], train={"batch_size": 32}),
        *fed("fedbn", [0.6], train={"batch_size": 8}),
    ]
    comparison = only(results, baseline="fedavg")
    fedbn = method(comparison, "fedbn")
    assert (fedbn.baseline, fedbn.differences) == (None, {})
    assert "difference" not in comparison_table(comparison).columns


def test_no_method_is_paired_or_ranked_with_one_on_other_data() -> None:
    results = [
        *fed("fedavg", [0.5], config={"data": {"train_per_client": 100}}),
        *fed("fedbn", [0.6], config={"data": {"train_per_client": 100}}),
        *fed("silobn", [0.9], config={"data": {"train_per_client": 700}}),
    ]
    comparison = only(results, baseline="fedavg")
    assert method(comparison, "fedbn").baseline == "fedavg"
    assert method(comparison, "silobn").differences == {}
    assert [found.rank for found in comparison.methods] == [2.0, 1.0, None]


def test_an_unknown_baseline_is_named(stream_result: Make) -> None:
    results = [*fed("fedavg", [0.5]), stream_result()]
    with pytest.raises(UnknownNameError, match=r"'fedvag'.*Did you mean 'fedavg'"):
        comparisons(results, baseline="fedvag")
    assert [found.baseline for found in comparisons(results, baseline="fedavg")] == ["fedavg", None]


def test_papers_numbers_stand_beside_ours() -> None:
    results = [*fed("fedavg", [0.5, 0.6]), *fed("fedbn", [0.6, 0.7])]
    paper = [
        {
            "match": {"strategy": {"name": "fedbn"}},
            "score": "mean",
            "value": 0.62,
            "std": 0.011,
            "source": "X, table 1",
        },
        {"match": {"strategy": {"name": "fedbn"}}, "score": "per_domain.a", "value": 0.9, "source": "X, table 2"},
        {"match": {"strategy": {"name": "fedbn"}}, "score": "per_domain.gone", "value": 0.5, "source": "X, table 1"},
        {"match": {}, "score": "mean", "value": 0.1, "source": "too general"},
        {"match": {"strategy": {"name": "fedbn"}, "seed": 7}, "score": "worst", "value": 0.1, "source": "not ours"},
    ]
    comparison = only(results, studies=[study_of(results, paper=paper)])
    found = method(comparison, "fedbn").paper
    assert (found["mean"].value, found["mean"].std, found["mean"].source) == (0.62, 0.011, "X, table 1")
    assert found["mean"].deviation == pytest.approx(0.03)
    assert found["per_domain.gone"].deviation is None
    assert "worst" not in found
    row = cells(comparison_table(comparison), "fedbn")
    assert (row["paper"], row["ours − paper"]) == ("62.0 ± 1.1", "+3.0")
    assert cells(comparison_table(comparison), "fedavg")["ours − paper"] == "+45.0"
    beside = paper_table(comparison)
    row = cells(beside, "fedbn")
    assert (row["mean accuracy"], row["a"]) == ("65.0 (62.0 ± 1.1, +3.0)", "75.0 (90.0, −15.0)")
    assert cells(beside, "fedavg")["a"] == "–"
    assert beside is not None
    assert "Papers: too general; X, table 1; X, table 2." in beside.notes
    assert paper_table(only(results)) is None


def test_papers_numbers_are_of_test_images_and_of_the_studys_own_runs() -> None:
    paper = [{"match": {}, "score": "mean", "value": 0.5, "source": "X"}]
    results = fed("fedavg", [0.5], config={"evaluate": {"split": "validation"}})
    assert only(results, studies=[study_of(results, paper=paper)]).methods[0].paper == {}
    results = fed("fedavg", [0.5])
    searched = study_of([], paper=paper, selection_runs=[results[0]["hash"]])
    assert only(results, studies=[searched]).methods[0].paper == {}


def test_the_selection_rule_is_in_the_caption() -> None:
    results = fed("fedavg", [0.5])
    chosen = {
        "rule": "Chosen by the mean validation accuracy over domains.",
        "split": "validation",
        "configurations": 6,
    }
    told = only(results, studies=[study_of(results, selection=chosen)]).caption[-1]
    assert told == "Study small: Chosen by the mean validation accuracy over domains; 6 configurations a method."
    told = only(results, studies=[study_of(results, selection={**chosen, "split": "test"})]).caption[-1]
    assert told.endswith("Chosen on TEST images (--select-on-test): these numbers are too good.")


def test_one_run_counts_once() -> None:
    results = fed("fedavg", [0.5, 0.6])
    assert only([*results, *results]).methods[0].scores["mean"].n == 2


def test_a_run_on_two_data_is_refused() -> None:
    first = federated(data={"digest": "aaaa"})
    with pytest.raises(ConfigError, match=r"had different data \(digest: aaaa and bbbb\)"):
        comparisons([first, {**first, "data": {**first["data"], "digest": "bbbb"}}])
    comparisons([first, {**first, "data": {**first["data"], "digest": None}}])


def test_pairs_on_different_data_are_refused() -> None:
    """Digests are compared within a seed: those of different seeds differ wherever the seed deals the data."""
    results = [
        *(fed("fedavg", [0.5, 0.6])),
        *(fed("fedbn", [0.5, 0.6])),
    ]
    for result, digest in zip(results, ("one", "two", "one", "two"), strict=True):
        result["data"]["digest"] = digest
    comparisons(results)
    results[3]["data"]["digest"] = "of another folder"
    with pytest.raises(
        ConfigError, match=f"{results[1]['hash']} .*fedavg, seed 2.*{results[3]['hash']} .*fedbn, seed 2"
    ):
        comparisons(results)


def test_models_of_other_input_sizes_may_see_other_pixels() -> None:
    first = federated(data={"digest": "at 28"}, model={"name": "digits_cnn"})
    second = federated(data={"digest": "at 64"}, model={"name": "alexnet"})
    assert len(only([first, second]).methods) == 2


def client(domain: str, train: int, test: int, validation: int = 0) -> dict[str, Any]:
    return {"client": 0, "domain": domain, "train": train, "validation": validation, "test": test, "held_out": False}


def test_one_mean_over_different_numbers_of_images_is_refused() -> None:
    whole = {"clients": [client("a", 60, 20), client("a", 40, 20, 10), client("b", 50, 10)]}
    dealt_otherwise = {"clients": [client("a", 80, 15, 10), client("a", 20, 25), client("b", 50, 10)]}
    short = {"clients": [client("a", 60, 20), client("a", 40, 20, 10), client("b", 50, 9)]}
    comparisons([federated(seed=1, data=whole), federated(seed=2, data=dealt_otherwise)])
    with pytest.raises(ConfigError, match=r"different data \(b test images: 10 and 9\)"):
        comparisons([federated(seed=1, data=whole), federated(seed=2, data=short)])
    less = {"clients": [client("a", 59, 20), client("a", 40, 20, 10), client("b", 50, 10)]}
    with pytest.raises(ConfigError, match=r"a training images: 110 and 109"):
        comparisons([federated(seed=1, data=whole), federated(seed=2, data=less)])
    skewed = {"config": {"data": {"partition": "dirichlet", "train_per_client": 60}}}  # a share may be below its cap
    comparisons([federated(seed=1, data=whole, **skewed), federated(seed=2, data=less, **skewed)])


def test_streams_of_different_numbers_of_images_are_refused(stream_result: Make) -> None:
    def run(seed: int, tests: Sequence[int], **scenario: Any) -> dict[str, Any]:
        result = stream_result(config={"seed": seed, "scenario": scenario})
        for line, count in zip(result["data"]["experiences"], tests, strict=True):
            line |= {"train": 10, "validation": 0, "test": count}
        return result

    comparisons([run(1, (5, 7)), run(2, (7, 5))])
    with pytest.raises(ConfigError, match=r"\(test images: 12 and 13\)"):
        comparisons([run(1, (5, 7)), run(2, (7, 6))])
    limited = {"test_per_experience": 7}
    comparisons([run(1, (5, 7), **limited), run(2, (7, 6), **limited)])


def test_two_runs_of_one_seed_are_no_replication() -> None:
    first = federated()
    with pytest.raises(ConfigError, match=f"{first['hash']} and older are both fedavg with seed 1"):
        comparisons([first, {**first, "hash": "older"}])


def test_scores_by_dotted_key() -> None:
    result = federated({"a": 0.5, "b.c": 0.25})
    assert score_of(result, "mean") == pytest.approx(0.375)
    assert score_of(result, "per_domain.a") == 0.5
    assert score_of(result, "per_domain.b.c") == 0.25
    for key in ("per_domain", "per_domain.z", "mean.a", "nothing", "selection", ""):
        assert score_of(result, key) is None


def test_matching_a_nested_subset() -> None:
    result = federated(strategy={"name": "fedbn"}, norm={"name": "group_norm"}, train={"learning_rate": 0.1}, seed=3)
    assert matches(result, {})
    assert matches(result, {"strategy": {"name": "FedBN"}, "norm": {"name": "group-norm"}})
    assert matches(result, {"train": {"learning_rate": 0.1, "batch_size": 32}, "seed": 3, "kind": "federated"})
    assert matches(result, {"norm": {"num_groups": 2}})  # its default, which the configuration leaves open
    assert matches(result, {"norm": {"options": {"num_groups": 2}}})
    assert not matches(result, {"norm": {"num_groups": 8}})
    assert not matches(result, {"norm": {"nothing": 1}})
    assert not matches(result, {"seed": 1})


def test_kinds_are_told_apart(stream_result: Make) -> None:
    results = [*fed("fedbn", [0.5]), stream_result()]
    assert [kind_of(result) for result in results[-2:]] == ["federated", "continual"]
    assert scored_on(results[0]) == ("federated", "digits (a, b)", "test")


def test_a_comparison_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        only([federated()]).title = "other"  # type: ignore[misc]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_published_records_compare(path: Path) -> None:
    """Independent of the code under test: means and deviations of the records by NumPy."""
    import numpy as np

    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    for comparison in comparisons(results):
        table = comparison_table(comparison)
        assert len(table.rows) == len(comparison.methods)
        for found in comparison.methods:
            values = [result["final"][comparison.headline] for result in found.results]
            assert found.scores[comparison.headline].mean == pytest.approx(np.mean(values))
            if len(values) > 1:
                assert found.scores[comparison.headline].std == pytest.approx(np.std(values, ddof=1))
                assert cells(table, found.label)["± sd"] == f"± {100 * np.std(values, ddof=1):.1f}"
