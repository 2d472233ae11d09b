"""Configurations: every mistake is named, every spelling means the same, every layer lies over the one before."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednorm.cards import STRATEGIES
from fednorm.cli.options import collect, nested
from fednorm.config import (
    EVALUATIONS,
    DataConfig,
    EvaluateConfig,
    RoundConfig,
    RunConfig,
    TrainConfig,
    merge,
    override,
    read_config,
    resolve,
    scalar,
)
from fednorm.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sede=1", r"no configuration key 'sede'\. Did you mean 'seed'\? Known here: kind, seed, threads"),
        ("train.learning_rat=1", r"no configuration key 'train\.learning_rat'\. Did you mean 'learning_rate'\?"),
        ("rounds.round=1", r"no configuration key 'rounds\.round'.*Known here: num_rounds, fraction"),
        ("qqqq.x=1", r"no configuration key 'qqqq'\. Known here"),
        ("train=1", "train is a table of keys; got 1"),
        ("seed=one", "seed must be an integer; got 'one'"),
        ("seed=1.5", r"seed must be an integer; got 1\.5"),
        ("seed=true", "seed must be an integer; got True"),
        ("seed.x=1", r"seed must be an integer; got \{'x': 1\}"),
        ("train.agc=high", r"train\.agc must be a finite number; got 'high'"),
        ("train.agc=true", r"train\.agc must be a finite number; got True"),
        ("train.learning_rate=inf", r"train\.learning_rate must be a finite number; got inf"),
        ("train.weight_decay=nan", r"train\.weight_decay must be a finite number; got nan"),
        ("data.merge=maybe", r"data\.merge must be true or false; got 'maybe'"),
        ("data.merge=1", r"data\.merge must be true or false; got 1"),
        ("data.partition=5", r"data\.partition must be a string; got 5"),
        ("data.domains=5", r"data\.domains must be a list of names; got 5"),
        ("norm.options=5", r"norm\.options is a table of options; got 5"),
        ("strategy.options=mu", r"strategy\.options is a table of options; got 'mu'"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(override(assignment))


def test_a_dotted_name_in_quotes_is_told_from_a_key_of_a_table() -> None:
    with pytest.raises(ConfigError, match=r"in TOML train\.momentum without quotation marks, in Python \{\"train\": "):
        resolve({"train.momentum": 0.5})


@pytest.mark.parametrize("value", [[1, 2], [["a"]], [None]])
def test_a_list_of_names_holds_names(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.domains must be a list of names"):
        resolve({"data": {"domains": value}})


@pytest.mark.parametrize(
    ("table", "key", "bad", "good"),
    [
        (DataConfig, "clients_per_domain", (0, -1), (1,)),
        (DataConfig, "validation", (-0.1, 1.0), (0.0, 0.99)),
        (DataConfig, "alpha", (0.0, -1.0), (1e-9,)),
        (DataConfig, "shards_per_client", (0,), (1,)),
        (DataConfig, "image_size", (-1,), (0, 1)),
        (DataConfig, "train_per_client", (-1,), (0, 1)),
        (DataConfig, "test_per_domain", (-1,), (0, 1)),
        (DataConfig, "partition", ("noniid", ""), ("iid", "dirichlet", "shards")),
        (TrainConfig, "learning_rate", (0.0, -1.0), (1e-9,)),
        (TrainConfig, "batch_size", (0,), (1,)),
        (TrainConfig, "local_epochs", (0,), (1,)),
        (TrainConfig, "momentum", (-0.1, 1.0), (0.0, 0.999)),
        (TrainConfig, "weight_decay", (-1e-9,), (0.0,)),
        (TrainConfig, "agc", (-1e-9,), (0.0,)),
        (RoundConfig, "num_rounds", (0,), (1,)),
        (RoundConfig, "fraction", (0.0, 1.1, -1.0), (1.0, 0.01)),
        (RoundConfig, "weighting", ("mean",), ("equal", "examples")),
        (RoundConfig, "evaluate_every", (0,), (1,)),
        (RoundConfig, "checkpoint_every", (0,), (1,)),
        (RoundConfig, "max_update_norm", (-1e-9, math.nan), (0.0, 1e9)),
        (RoundConfig, "min_answered", (-0.1, 1.1, math.nan), (0.0, 1.0)),
        (EvaluateConfig, "kinds", (("own", "crosss"),), ((), EVALUATIONS)),
        (EvaluateConfig, "images", (1, 0), (2,)),
        (EvaluateConfig, "fallback", ("none",), ("refuse", "averaged", "pooled", "reestimated")),
        (EvaluateConfig, "split", ("train",), ("test", "validation")),
        (EvaluateConfig, "batch_size", (0,), (1,)),
        (RunConfig, "threads", (0,), (1,)),
        (RunConfig, "kind", ("contnual",), ("federated", "continual")),
    ],
)
def test_ranges(table: type[Any], key: str, bad: tuple[Any, ...], good: tuple[Any, ...]) -> None:
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            table(**{key: value})
        wrong = [item for item in value if item not in EVALUATIONS] if isinstance(value, tuple) else [value]
        assert key in str(caught.value)
        assert str(wrong[0]) in str(caught.value)
    for value in good:
        assert getattr(table(**{key: value}), key) == value


def test_a_choice_offers_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"one of iid, dirichlet, shards; got 'dirichlett'\. Did you mean 'dirichlet'"
    ):
        DataConfig(partition="dirichlett")


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"Cannot read the configuration file .*run\.toml: No such file"):
        read_config(path)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config(tmp_path)
    for content in (b"seed = \n", b"\xff\xfe", b"seed = 1\nseed = 2"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML"):
            read_config(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("-3", -3), ("1.5", 1.5), ("1e-3", 0.001), ("true", True), ("False", False), ("a,b", "a,b"), ("", "")],
)
def test_a_value_is_read_as_toml_would(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    assert override(f" data.name ={text}") == {"data": {"name": value}}


@pytest.mark.parametrize("assignment", ["seed", "=1", " =1", ""])
def test_a_setting_without_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"--set takes section\.key=value; got "):
        override(assignment)


def test_a_value_may_hold_an_equals_sign() -> None:
    assert override("data.dir=/a=b") == {"data": {"dir": "/a=b"}}


TREES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.integers(0, 3) | inner),
    max_leaves=6,
)


@given(TREES, TREES, TREES)
def test_merging_is_associative_keeps_what_is_not_named_and_changes_nobody(a: Any, b: Any, c: Any) -> None:
    before = repr((a, b))
    merged = merge(a, b)
    assert repr((a, b)) == before
    assert merge(merged, b) == merged
    assert merge(a, {}) == merge({}, a) == a
    assert set(merged) == set(a) | set(b)
    for key in set(b) - {k for k in b if isinstance(b[k], dict)}:
        assert merged[key] == b[key]
    for key in set(a) - set(b):
        assert merged[key] == a[key]
    tables = all(isinstance(x.get(k), dict) == isinstance(y.get(k), dict) for x, y in ((a, b), (b, c)) for k in "abc")
    if tables:
        assert merge(merge(a, b), c) == merge(a, merge(b, c))


def test_settings_lie_over_options_and_options_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 1\nthreads = 3\n[train]\nagc = 0.1\nlearning_rate = 0.1\n[strategy]\nname = "fedbn"')
    flags = {"seed": 2, "train.learning_rate": 0.2, "data.domains": "scans, photo", "norm.name": None}
    config = collect(path, flags, ["train.learning_rate=0.3", "train.momentum=0.5", "train.momentum=0.6"])
    assert (config.seed, config.threads) == (2, 3)
    assert config.train == TrainConfig(agc=0.1, learning_rate=0.3, momentum=0.6)
    assert config.data.domains == ("scans", "photo")
    assert config.strategy.name == "fedbn"


def test_options_that_are_not_given_are_not_there() -> None:
    assert nested({"a.b": 1, "a.c": None, "a.d": 0, "e": False}) == {"a": {"b": 1, "d": 0}, "e": False}


# What a strategy brings along -----------------------------------------------------------------------------------------


def test_fedwon_brings_its_norm_and_its_clipping() -> None:
    config = resolve({"strategy": {"name": "fedwon"}})
    assert (config.norm.name, config.train.agc) == ("sws", 0.64)
    assert resolve({"strategy": {"name": "fedwon"}, "train": {"agc": 0}}).train.agc == 0
    assert resolve({"strategy": {"name": "fedwon"}, "norm": {"name": "ws-group-norm"}}).norm.name == ("ws_group_norm")


@pytest.mark.parametrize("auto", [{}, {"norm": {}}, {"norm": {"name": "auto"}}, {"norm": {"name": "Auto"}}])
@pytest.mark.parametrize("strategy", ["fedavg", "fedwon"])
def test_auto_is_the_strategy_s_own_norm(auto: dict[str, Any], strategy: str) -> None:
    own = STRATEGIES[strategy].defaults.get("norm", {"name": "batch_norm"})["name"]
    assert resolve({"strategy": {"name": strategy}, **auto}).norm.name == own


def test_options_of_auto_are_the_own_norm_s() -> None:
    config = resolve({"strategy": {"name": "fedwon"}, "norm": {"name": "auto", "activation_gain": False}})
    assert config.norm.options == {"activation_gain": False}


def test_an_option_has_the_type_that_its_method_declares() -> None:
    mu = resolve({"strategy": {"name": "fedprox", "mu": 1}}).strategy.options["mu"]
    assert (mu, type(mu)) == (1.0, float)
    for value in (True, "high", [1]):
        with pytest.raises(ConfigError, match=r"strategy\.mu must be a finite number; got "):
            resolve({"strategy": {"name": "fedprox", "mu": value}})


@pytest.mark.parametrize("width", [-1, 1.5, True, "wide"])
def test_a_width_is_a_number_of_channels(width: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.width must be 0 \(the model's own\) or a number of channels; got "):
        resolve({"model": {"width": width}})


@pytest.mark.parametrize("norm", ["group_norm", "Group-Norm", " group-norm "])
@pytest.mark.parametrize("data", ["digits_mini", "digits-mini", "Digits-Mini"])
def test_names_are_read_in_any_spelling(norm: str, data: str) -> None:
    values = {"norm": {"name": "group_norm"}, "data": {"name": "digits_mini"}}
    assert resolve({"norm": {"name": norm}, "data": {"name": data}}) == resolve(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": {"name": "fedbm"}}, "no strategy named 'fedbm'. Did you mean 'fedbn'"),
        ({"strategy": {"name": "zzz"}}, r"no strategy named 'zzz'. All \d+: fednorm list strategies."),
        ({"strategy": {"name": 5}}, "no strategy named '5'"),
        ({"norm": {"name": "bach_norm"}}, "no norm named 'bach_norm'. Did you mean 'batch_norm'"),
    ],
)
def test_unknown_names_come_with_the_nearest(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        resolve(values)


@pytest.mark.parametrize("section", ["norm", "strategy", "data"])
def test_a_section_that_is_only_a_name_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=f"{section} is a table of keys; got 'fedbn'"):
        resolve({section: "fedbn"})


@given(
    st.sampled_from(["fedavg", "fedbn", "fedwon", "fedprox"]),
    st.integers(0, 2**70),
    st.floats(1e-9, 1e9),
    st.lists(st.sampled_from(EVALUATIONS), unique=True),
)
def test_a_resolved_configuration_resolves_to_itself(strategy: str, seed: int, rate: float, kinds: list[str]) -> None:
    values = {
        "strategy": {"name": strategy},
        "seed": seed,
        "train": {"learning_rate": rate},
        "evaluate": {"kinds": kinds},
        "norm": {"name": "auto"},
    }
    config = resolve(values)
    again = resolve(config.to_dict())
    assert again == config
    assert again.hash == config.hash
    assert dataclasses.replace(config, seed=seed + 1).hash != config.hash
