"""Places in a model: what patterns over its keys mean, and the roles that a rule gives to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fednorm.cards import STRATEGIES
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federation.plan import norm_plan
from fednorm.recognition.places import head_of, keys_at, patterns_of
from fednorm.roles import Kind, Role, RoleRule


def network() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module(
        "stem", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    )
    model.add_module("fc1", nn.Linear(16, 4))
    model.add_module("fc10", nn.Linear(4, 3))
    return model


BATCH_NORM = {f"stem.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("head", {"fc10.weight", "fc10.bias"}),
        ("head.*", {"fc10.weight", "fc10.bias"}),
        ("head.bias", {"fc10.bias"}),
        ("fc1", {"fc1.weight", "fc1.bias"}),  # a path, and not what merely begins like it
        ("fc1.*", {"fc1.weight", "fc1.bias"}),
        ("fc1*", {"fc1.weight", "fc1.bias", "fc10.weight", "fc10.bias"}),
        ("stem.1", BATCH_NORM),
        ("*.bias", {"stem.0.bias", "stem.1.bias", "fc1.bias", "fc10.bias"}),
        ("stem.0.weight", {"stem.0.weight"}),
        ("*", set(network().state_dict())),
    ],
)
def test_a_pattern_means_these_keys(pattern: str, keys: set[str]) -> None:
    assert keys_at(network(), [pattern]) == keys


def test_the_head_is_the_last_weight_layer_by_module_order() -> None:
    assert head_of(network()) == "fc10"
    assert head_of(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1))) == "1"
    assert head_of(nn.Linear(2, 2)) == ""
    assert keys_at(nn.Linear(2, 2), ["head"]) == {"weight", "bias"}
    with pytest.raises(ConfigError, match="no linear layer and no convolution"):
        head_of(nn.Sequential(nn.BatchNorm1d(3)))


def test_where_a_module_is_called_head_its_keys_are_meant_by_a_pattern_over_keys() -> None:
    model = nn.Sequential()
    model.add_module("head", nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    model.add_module("last", nn.Linear(4, 2))
    assert keys_at(model, ["head.*"]) == {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert keys_at(model, ["head"]) == {"last.weight", "last.bias"}


@pytest.mark.parametrize(("pattern", "near"), [("fc01.*", "fc1"), ("stem.0.wieght", "stem.0.weight"), ("", "fc10")])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(pattern: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"matches '{pattern}'.*nearest: .*{near}".replace("*'", r"\*'")):
        keys_at(network(), ["head", pattern])


def test_a_tensor_under_two_keys_is_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    assert keys_at(model, ["head"]) == {"0.weight", "2.weight"}


def test_a_place_goes_before_a_kind_and_a_constant_stays_one() -> None:
    model = network()
    model.fc10.register_buffer("table", torch.ones(3))
    rule = RoleRule({Kind.MEAN: Role.RESET}, local_modules=("head", "stem.1.running_*"), reset_modules=("fc1", "fc10"))
    roles = {key: entry.role for key, entry in norm_plan(model, rule).by_key.items()}
    assert roles == {
        **dict.fromkeys(("stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"), Role.SHARED),
        "stem.1.num_batches_tracked": Role.SHARED,
        **dict.fromkeys(("stem.1.running_mean", "stem.1.running_var"), Role.LOCAL),
        **dict.fromkeys(("fc1.weight", "fc1.bias"), Role.RESET),
        **dict.fromkeys(("fc10.weight", "fc10.bias"), Role.LOCAL),
        "fc10.table": Role.CONSTANT,
    }


KEYS = tuple(network().state_dict())


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.sets(st.sampled_from(KEYS), min_size=1, max_size=len(KEYS) - 1), name=st.sampled_from(["fedavg", "fedbn"])
)
def test_every_strategy_keeps_what_its_option_names_and_nothing_else_changes(chosen: set[str], name: str) -> None:
    model, card = network(), STRATEGIES[name]
    plain = card.make(model).plan
    if set(plain.sent) <= chosen:
        return  # refused: nothing would be sent
    plan = card.make(model, local=" , ".join(sorted(chosen))).plan
    for key in KEYS:
        assert plan.by_key[key].role is (Role.LOCAL if key in chosen else plain.by_key[key].role)


@pytest.mark.parametrize("name", STRATEGIES.names)
def test_the_option_is_every_strategys_and_part_of_the_runs_identity(name: str) -> None:
    def config(**options: Any) -> Any:
        return resolve({"strategy": {"name": name, **options}})

    assert config(local="").hash == config().hash
    assert "local" not in config().strategy.values
    assert config(local="fc3.*").hash != config().hash
    assert config(local="fc3.*").strategy.values["local"] == "fc3.*"
    with pytest.raises(ConfigError, match=r"strategy\.local must be a string"):
        config(local=3)


def test_patterns_are_separated_by_commas() -> None:
    assert patterns_of(" fc3.*, head ,,") == ("fc3.*", "head")
    assert patterns_of("") == ()
