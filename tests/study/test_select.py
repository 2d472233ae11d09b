"""Choosing configurations: on validation images, one for each strategy and norm, and never on test images."""

from __future__ import annotations

from typing import Any

import pytest

from fednorm.errors import ConfigError
from fednorm.registry import resolve_config
from fednorm.study.select import best_by_method


def result(mean: float, strategy: str = "fedbn", norm: str = "auto", split: str = "validation", **train: Any) -> Any:
    values = {"strategy": {"name": strategy}, "norm": {"name": norm}, "evaluate": {"split": split}, "train": train}
    config = resolve_config(values)
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
