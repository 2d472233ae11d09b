"""Choosing configurations: on validation images, one for each method, and never on test images."""

from __future__ import annotations

from typing import Any

import pytest

from fednorm.cards import SCENARIOS
from fednorm.config import merge, resolve
from fednorm.errors import ConfigError, FedNormError
from fednorm.study.select import best_by_method, best_of, kind_of, mean_score, rule, rules


def result(mean: float, strategy: str = "fedbn", norm: str = "auto", split: str = "validation", **train: Any) -> Any:
    values = {"strategy": {"name": strategy}, "norm": {"name": norm}, "evaluate": {"split": split}, "train": train}
    config = resolve(values)
    return {"hash": config.hash, "config": config.to_dict(), "final": {"mean": mean}}


def test_each_strategy_and_norm_keeps_its_best() -> None:
    results = [
        result(0.5, learning_rate=0.1),
        result(0.7, learning_rate=0.2),
        result(0.6, learning_rate=0.3),
        result(0.9, "fedavg"),
        result(0.1, "fedavg", "group_norm"),
        result(0.2, "fedwon", agc=0.1),
    ]
    assert best_by_method(results) == [results[1], *results[3:]]


def test_options_of_a_norm_are_hyper_parameters() -> None:
    two = result(0.5, "fedavg", "group_norm")
    other = result(0.6, "fedavg", "group_norm")
    other["config"]["norm"]["num_groups"] = 8
    assert best_by_method([two, other]) == [other]


def test_ties_go_to_the_first() -> None:
    results = [result(0.5, learning_rate=0.1), result(0.5, learning_rate=0.2)]
    assert best_by_method(results) == results[:1]


def test_nothing_is_chosen_on_test_images() -> None:
    bad = result(0.9, split="test")
    with pytest.raises(ConfigError, match=f"Run {bad['hash']} was scored on test images"):
        best_by_method([result(0.5), bad])


def test_seeds_are_not_hyper_parameters() -> None:
    """A configuration is chosen by the mean over its seeds; the luckiest seed is no configuration."""
    steady = [result(score, learning_rate=0.1) for score in (0.6, 0.6)]
    lucky = [result(score, learning_rate=0.2) for score in (0.7, 0.3)]
    for group in (steady, lucky):
        for seed, one in enumerate(group):
            one["config"]["seed"] = seed
    assert best_by_method([*lucky, *steady]) == steady


# Streams --------------------------------------------------------------------------------------------------------------


def streamed(score: float | None, *, title: str = "split", memorization: bool = False, **sections: Any) -> Any:
    values = {"kind": "continual", "evaluate": {"split": "test" if memorization else "validation"}}
    config = resolve(merge(values, sections))
    final = {"average_accuracy": None if memorization else score, "plasticity": score if memorization else 0.0}
    data = {"title": title, "memorization": memorization}
    return {"kind": "continual", "hash": config.hash, "config": config.to_dict(), "data": data, "final": final}


def test_each_learner_and_norm_keeps_its_best_configuration() -> None:
    results = [
        streamed(0.5, train={"learning_rate": 0.1}, norm={"name": "adab2n", "kappa": 0.1}),
        streamed(0.7, train={"learning_rate": 0.1}, norm={"name": "adab2n", "kappa": 0.4}),
        streamed(0.6, train={"learning_rate": 0.2}, norm={"name": "adab2n", "kappa": 0.4}),
        streamed(0.4, norm={"name": "group_norm", "num_groups": 8}),
        streamed(0.3, norm={"name": "group_norm", "num_groups": 4}),
        streamed(0.1, learner={"name": "er"}, norm={"name": "adab2n"}),
        streamed(0.9, learner={"name": "er"}, norm={"name": "adab2n"}, train={"agc": 0.1, "epochs": 1}),
    ]
    assert best_by_method(results) == [results[1], results[3], results[6]]


@pytest.mark.parametrize(
    "other",
    [
        {"learner": {"passes": "separate"}},
        {"learner": {"statistics": "balanced"}},
        {"learner": {"recalibrate": True}},
        {"norm": {"name": "adab2n", "corrected": True}},
        {"train": {"project": True}},
        {"model": {"activation": "leaky_relu"}},
        {"train": {"l2_init": 0.001}},
        {"train": {"shrink": 0.9}},
        {"train": {"perturb": 0.01}},
        {"train": {"redo_every": 1000}},
        {"train": {"cbp_rate": 1e-4}},
        {"train": {"heads": "task"}},
        {"train": {"snr_eta": 0.02}},
        {"train": {"hyperspherical": True}},
        {"train": {"weight_clip": 2.0}},
        {"train": {"l2_scales": 0.001}},
        {"train": {"weight_decay": 0.001}},
    ],
    ids=str,
)
def test_what_makes_another_method_is_not_tuned(other: dict[str, Any]) -> None:
    plain, rival = streamed(0.5), streamed(0.1, **other)
    assert best_by_method([plain, rival]) == [plain, rival]


def test_how_much_of_a_rival_is_tuned() -> None:
    results = [streamed(score, train={"l2_init": factor}) for score, factor in ((0.2, 1e-3), (0.3, 1e-4), (0.1, 0.0))]
    assert best_by_method(results) == results[1:]


def test_streams_are_chosen_for_one_by_one() -> None:
    results = [streamed(0.5, title="one"), streamed(0.4, title="two", train={"learning_rate": 0.2})]
    assert best_by_method(results) == results


def test_seeds_of_a_stream_are_judged_by_their_mean() -> None:
    steady = [streamed(0.6, seed=seed, data={"dir": f"place {seed}"}) for seed in (1, 2)]
    lucky = [streamed(score, seed=seed, train={"learning_rate": 1.0}) for seed, score in ((1, 0.7), (2, 0.4))]
    assert best_by_method([*lucky, *steady]) == steady


def test_memorization_is_chosen_by_plasticity_and_says_so() -> None:
    results = [
        streamed(score, memorization=True, train={"learning_rate": rate}) for rate, score in ((0.1, 0.5), (0.2, 0.8))
    ]
    assert best_by_method(results) == results[1:]
    assert [sentence.split(",")[0] for sentence in rules([*results, result(0.5), streamed(0.5)])] == [
        "Chosen by plasticity",
        "Chosen by the mean validation accuracy over domains.",
        "Chosen by the average accuracy on validation images after the last experience.",
    ]


def test_no_stream_is_chosen_on_test_images_or_on_nothing() -> None:
    bad = streamed(0.9, evaluate={"split": "test"})
    with pytest.raises(ConfigError, match=f"Run {bad['hash']} was scored on test images"):
        best_by_method([streamed(0.5), bad])
    with pytest.raises(
        ConfigError, match=r"has no average accuracy to be chosen by: evaluate\.experiences is 'current'"
    ):
        best_by_method([streamed(None, evaluate={"experiences": "current"})])


def test_kinds_do_not_mix() -> None:
    results = [result(0.1), streamed(0.9), result(0.2, learning_rate=0.2)]
    assert best_by_method(results) == [results[2], results[1]]


# Within a study ------------------------------------------------------------------------------------------------------


def test_the_best_mean_over_seeds_wins_whatever_was_scored() -> None:
    groups = [[result(score, split="test") for score in scores] for scores in ((0.7, 0.3), (0.6, 0.6), (0.6, 0.6))]
    assert [mean_score(group) for group in groups] == [0.5, 0.6, 0.6]
    assert best_of(groups) == 1


def test_the_sentence_names_the_images_and_a_choice_on_test_images_is_called_one() -> None:
    assert rule("federated", on_test=False) == "Chosen by the mean validation accuracy over domains."
    for kind in ("federated", "continual"):
        assert "validation" not in rule(kind, on_test=True)
        assert rule(kind, on_test=True).endswith("(--select-on-test): the test numbers flatter every method.")
    assert rule("memorization", on_test=True) == rule("memorization", on_test=False)


@pytest.mark.parametrize("scenario", SCENARIOS.names)
def test_what_a_configuration_is_about_is_known_before_it_is_run(scenario: str) -> None:
    from fednorm.streams.workbench import ContinualWorkbench

    values = {"kind": "continual", "scenario": {"name": scenario}, "learner": {"name": "naive"}}
    config: Any = resolve(values)
    try:
        memorization = ContinualWorkbench(config).stream.memorization
    except FedNormError:
        pytest.skip("the scenario needs a folder of real data")
    assert kind_of(config) == ("memorization" if memorization else "continual")
    assert kind_of(resolve({})) == "federated"
