"""How methods of one name are told apart in tables."""

from __future__ import annotations

from typing import Any

from fednorm.report._common import by_method
from fednorm.testing import resolve


def labels(*trainings: dict[str, Any]) -> list[str]:
    config = {"kind": "federated", "strategy": {"name": "fedwon"}}
    results = [{"config": resolve({**config, "train": train}).to_dict(), "seed": 1} for train in trainings]
    return list(by_method(results, lambda _: "fedwon"))


def test_a_few_settings_are_told_whole() -> None:
    assert labels({"agc": 0.16}, {"agc": 0.64}, {"agc": 0.64, "learning_rate": 0.1}) == [
        "fedwon lr 0.01, agc 0.16",
        "fedwon lr 0.01, agc 0.64",
        "fedwon lr 0.1, agc 0.64",
    ]


def test_of_many_settings_a_label_says_what_is_unlike_most() -> None:
    changes = [{}, {"agc": 2.56}, {"momentum": 0.9}, {"weight_decay": 0.005, "learning_rate": 0.1}]
    assert labels(*changes) == [
        "fedwon",
        "fedwon agc 2.56",
        "fedwon train.momentum 0.9",
        "fedwon lr 0.1, train.weight_decay 0.005",
    ]


def test_a_value_that_half_have_is_told() -> None:
    also = [{"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0}, {"momentum": 0.9, "weight_decay": 0.1}]
    halves = [{"agc": agc, "label_smoothing": 0.1, **rest} for agc in (0.16, 0.64) for rest in also]
    told = labels(*halves)
    assert len(set(told)) == 4
    assert told[0] == "fedwon train.momentum 0.0, train.weight_decay 0.0, train.label_smoothing 0.0, agc 0.16"
