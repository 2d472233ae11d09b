"""Grids: which runs lists of values stand for, what each is called, and what is refused before anything runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednorm.config import RunConfig, flatten, nest, resolve
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.study.grid import axes, checked, combinations, expand, labels


def short(configs: list[RunConfig]) -> list[tuple[Any, ...]]:
    return [(c.strategy.name, c.norm.name, c.seed, c.train.learning_rate) for c in configs]  # type: ignore[union-attr]


def test_every_point_meets_every_combination() -> None:
    points = [
        {"strategy": {"name": "fedbn"}},
        {"strategy": {"name": "fedavg"}, "norm": {"name": "group-norm", "num_groups": 4}},
    ]
    base = {"kind": "federated", "seed": 9, "model": {"width": 4}}
    configs = expand(base, points, {"seed": [1, 2], "train": {"learning_rate": [0.1, 0.2]}}, {})
    expected = [
        (*method, seed, rate)
        for method in (("fedbn", "batch_norm"), ("fedavg", "group_norm"))
        for seed in (1, 2)
        for rate in (0.1, 0.2)
    ]
    assert short(configs) == expected
    assert {c.model.width for c in configs} == {4}
    assert dict(configs[-1].norm.options) == {"num_groups": 4}


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), max_size=3))
def test_combinations_are_the_product_in_the_order_of_the_table(lists: list[list[int]]) -> None:
    table = {f"key{number}": values for number, values in enumerate(lists)}
    made = [tuple(one.values()) for one in combinations(axes(table))]
    assert made == list(itertools.product(*lists))


NESTED = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), NESTED, max_size=3))
def test_nesting_undoes_flattening(table: dict[str, Any]) -> None:
    assert nest(flatten(table)) == table


def test_overrides_lie_over_points_and_take_the_place_of_lists() -> None:
    configs = expand({"seed": 1}, [{"seed": 2}], {"seed": [3]}, {"data": {"dir": "/data"}})
    assert [(config.seed, config.data.dir) for config in configs] == [(3, "/data")]
    assert [config.seed for config in expand({"seed": 1}, [{}], {"seed": [2, 3]}, {"seed": 4})] == [4]


def test_values_that_are_lists_themselves_are_lists_of_lists() -> None:
    configs = expand({}, [{}], {"data": {"domains": [["scans"], ["photo", "fonts"]]}}, {})
    assert [config.data.domains for config in configs] == [("scans",), ("photo", "fonts")]


FEDBN, SPELLED = {"strategy": {"name": "fedbn"}}, {"strategy": {"name": "FedBN"}, "seed": 1}


@pytest.mark.parametrize(
    ("points", "grid", "overrides", "words"),
    [
        (
            [FEDBN, {}, SPELLED],
            {},
            {},
            ("point 1 (strategy.name = 'fedbn')", "point 3 (strategy.name = 'FedBN'", "Take"),
        ),
        ([{}, {"rounds": {"num_rounds": 10}}], {}, {}, ("point 1 (no key)", "point 2 (rounds.num_rounds = 10)")),
        ([{}], {"seed": [1, 2], "data": {"dir": ["/a", "/b"]}}, {}, ("seed = 1, data.dir = '/a'", "not on data.dir")),
        (
            [FEDBN, {}],
            {},
            {"strategy": {"name": "fedavg"}},
            ("strategy.name was set for both: leave that out, or take",),
        ),
    ],
)
def test_two_runs_with_one_hash_are_named(
    points: list[dict[str, Any]], grid: dict[str, Any], overrides: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="Two runs of the study are one and the same") as raised:
        expand({}, points, grid, overrides)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("base", "grid", "message"),
    [
        ({}, {"seed": 3}, r"^grid\.seed must be a list of one value or more; got 3"),
        ({}, {"train": {"agc": []}}, r"^grid\.train\.agc must be a list of one value or more; got \[\]"),
        ({}, {"seed": [1, 2, 1]}, r"^grid\.seed names 1 twice"),
        ({"seed": [1, 2]}, {}, r"seed must be an integer; got \[1, 2\]"),
        ({}, {"train": {"learnin_rate": [1.0]}}, r"no configuration key 'train\.learnin_rate'.*'learning_rate'"),
        ({}, {"norm": {"num_group": [1]}}, r"no configuration key 'norm\.num_group': norm batch_norm has no option"),
        ({"norm": {"name": "group_norm", "num_group": 2}}, {}, r"'norm\.num_group'.*Did you mean 'num_groups'\?"),
        ({"norm": {"name": "group_norm", "num_groups": 0}}, {}, r"num_groups must be"),
        ({"strategy": {"name": "fedprox", "nu": 1.0}}, {}, r"'strategy\.nu'.*Did you mean 'mu'\?"),
        ({"kind": "continual", "learner": {"memory": 1}}, {}, r"'learner\.memory'.*Did you mean 'memory_"),
        ({"kind": "continual", "scenario": {"experiences": 1}}, {}, r"'scenario\.experiences'.*'num_experiences'"),
        ({"kind": "continual", "learner": {"memory_size": -1}}, {}, r"memory_size must be"),
        ({}, {"seed": [[1]]}, r"seed must be an integer; got \[1\]"),
        ({"kind": "centralised"}, {}, "kind must be one of federated, continual, .*; got 'centralised'"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_the_nearest(
    base: dict[str, Any], grid: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(base, [{}], grid, {})


def test_true_and_one_are_two_values() -> None:
    assert axes({"a": [True, 1, 0, False]})[0].values == (True, 1, 0, False)


def test_an_unknown_name_in_a_grid_is_refused_before_anything_runs() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'fedbn'"):
        expand({}, [{}], {"strategy": {"name": ["fedavg", "fedbm"]}}, {})


def test_runs_are_called_by_what_tells_them_apart() -> None:
    points = [
        {"strategy": {"name": "fedwon"}, "train": {"agc": 0.16}},
        {"strategy": {"name": "fedbn"}},
        {"norm": {"name": "group_norm", "num_groups": 8}},
    ]
    grid = {"train": {"learning_rate": [0.1]}, "data": {"domains": [["scans", "photo"], ["fonts"]]}}
    configs = expand({}, points, grid, {})
    assert labels(configs)[::2] == [
        "fedwon, domains scans,photo, agc 0.16, seed 1",
        "fedbn, domains scans,photo, agc 0, seed 1",
        "fedavg + group_norm, domains scans,photo, agc 0, num_groups 8, seed 1",
    ]
    assert labels(configs[3:4], seed=False) == ["fedbn"]
    streams = expand({"kind": "continual"}, [{}], {"scenario": {"name": ["split_digits", "domain_digits"]}}, {})
    assert labels(streams) == [
        "er_ace + batch_norm, split_digits, seed 1",
        "er_ace + batch_norm, domain_digits, seed 1",
    ]
    assert labels(configs, seed=False, apart_from={("data", "domains"), ("train", "agc")})[0] == "fedwon"
    assert labels([]) == []


def test_a_model_that_cannot_be_identified_is_refused_in_a_study_alone() -> None:
    model = {"model": {"name": lambda num_classes: num_classes}}
    assert resolve(model).sources["model"].startswith("process-")
    with pytest.raises(ConfigError, match=r"is an object of this Python process, and a study.*into a module"):
        checked(model)
