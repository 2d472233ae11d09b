"""Configurations of streams: mistakes are named, scenarios bring their own, a run is named by what it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednorm.cards import LEARNERS, OPTIMIZERS, SCENARIOS
from fednorm.config import (
    IMMATERIAL,
    ONLINE,
    EvaluateConfig,
    RunConfig,
    TrainConfig,
    digest,
    override,
    require_online,
    resolve,
)
from fednorm.errors import ConfigError, UnknownNameError


def stream(**values: Any) -> RunConfig:
    return resolve({"kind": "continual", **values})


def test_online_learning_is_one_pass() -> None:
    """The command line and the Python entry ask alike."""
    assert require_online(config := stream(train=ONLINE)) is config
    require_online(stream(train={**ONLINE, "batch_size": 3}))
    with pytest.raises(ConfigError, match=r"one pass over each experience, and train.epochs is 3\. Leave one of"):
        require_online(stream(train={**ONLINE, "epochs": 3}))


def test_the_kind_says_which_configuration_it_is() -> None:
    assert [resolve(values).kind for values in ({}, {"kind": "federated"}, {"kind": "continual"})] == [
        "federated",
        "federated",
        "continual",
    ]
    with pytest.raises(ConfigError, match=r"kind must be one of federated, continual, .*; got 'contnual'"):
        resolve({"kind": "contnual"})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("scenari.name=x", r"no configuration key 'scenari'\. Did you mean 'scenario'\?"),
        (
            "strategy.name=fedavg",
            r"no configuration key 'strategy'\. .*Known here: kind, seed, threads, .*device, amp, compile, .*data",
        ),
        ("rounds.num_rounds=3", "no configuration key 'rounds'"),
        ("train.learning_rat=1", r"no configuration key 'train\.learning_rat'\. Did you mean 'learning_rate'\?"),
        (
            "train.local_epochs=1",
            r"no configuration key 'train\.local_epochs'\. It is a key of federated .* runs\. Did you mean 'epochs'\?",
        ),
        ("evaluate.kinds=own", r"no configuration key 'evaluate\.kinds'.*Known here: split, experiences, batch_size"),
        ("evaluate.probe=2", r"no configuration key 'evaluate\.probe'\."),
        ("learner=er", "learner is a table of keys; got 'er'"),
        ("scenario=split_digits", "scenario is a table of keys; got 'split_digits'"),
        ("learner.options=3", r"learner\.options is a table of options; got 3"),
        ("train.epochs=1.5", r"train\.epochs must be an integer; got 1\.5"),
        ("train.epochs=many", r"train\.epochs must be an integer; got 'many'"),
        ("train.project=1", r"train\.project must be true or false; got 1"),
        ("train.shrink=true", r"train\.shrink must be a finite number; got True"),
        ("train.l2_init=inf", r"train\.l2_init must be a finite number; got inf"),
        ("train.schedule=3", r"train\.schedule must be a string; got 3"),
        (
            "train.schedule=cosin",
            r"one of constant, linear, cosine, step, exponential; got 'cosin'\. Did you mean 'cosine'",
        ),
    ],
)
def test_a_stream_s_unknown_keys_and_wrong_types_are_named(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(**override(assignment))


@pytest.mark.parametrize(
    ("table", "key", "bad", "good"),
    [
        (TrainConfig, "augment", ("flop",), ("none", "crop", "crop_flip", "rotate,jitter")),
        (TrainConfig, "rotate_degrees", (-1.0, 181.0), (0.0, 180.0)),
        (TrainConfig, "jitter", (-0.1, 1.1), (0.0, 1.0)),
        (TrainConfig, "schedule", ("poly",), ("constant", "linear", "cosine", "step", "exponential")),
        (TrainConfig, "decay", (0.0, 1.1), (1e-9, 1.0)),
        (TrainConfig, "decay_every", (0,), (1,)),
        (TrainConfig, "clip_norm", (-1e-9,), (0.0,)),
        (TrainConfig, "label_smoothing", (-0.1, 1.0), (0.0, 0.9)),
        (TrainConfig, "schedule_over", ("epoch",), ("stream", "experience")),
        (TrainConfig, "learning_rate", (0.0, -1.0), (1e-9,)),
        (TrainConfig, "batch_size", (0, -1), (1,)),
        (TrainConfig, "epochs", (0,), (1,)),
        (TrainConfig, "checkpoint_every", (0,), (1,)),
        (TrainConfig, "momentum", (-0.1, 1.0), (0.0, 0.999)),
        (TrainConfig, "weight_decay", (-1e-9,), (0.0,)),
        (TrainConfig, "agc", (-1e-9,), (0.0,)),
        (TrainConfig, "agc_on", ("conv",), ("all", "convolutions", "linear")),
        (TrainConfig, "warmup_steps", (-1,), (0,)),
        (TrainConfig, "l2_init", (-1e-9,), (0.0,)),
        (TrainConfig, "perturb", (-0.1,), (0.0, 2.0)),
        (TrainConfig, "shrink", (-0.1, 1.1), (0.0, 1.0)),
        (TrainConfig, "final_rate", (-0.1, 1.1), (0.0, 1.0)),
        (TrainConfig, "wd_ratio", (-0.1, 1.1), (0.0, 1.0)),
        (TrainConfig, "delta", (-0.1,), (0.0, 9.0)),
        (TrainConfig, "trainable", ("nrm", "all,norm", "norm,norm", ""), ("all", "norm", "head", "norm,head")),
        (TrainConfig, "linear_probe_epochs", (-1,), (0, 3)),
        (TrainConfig, "l2_scales", (-1e-9,), (0.0, 2.0)),
        (TrainConfig, "weight_clip", (-1e-9,), (0.0, 2.0)),
        (TrainConfig, "cbp_rate", (-0.1, 1.1), (0.0, 1.0)),
        (TrainConfig, "cbp_maturity", (-1,), (0,)),
        (TrainConfig, "cbp_decay", (-0.1, 1.0), (0.0, 0.999)),
        (TrainConfig, "snr_eta", (-0.1, 1.0), (0.0, 0.9)),
        (TrainConfig, "snr_longest", (0,), (1,)),
        (TrainConfig, "beta_utility", (-0.1, 1.0), (0.0, 0.999)),
        (TrainConfig, "sigma", (-0.1,), (0.0, 9.0)),
        (TrainConfig, "redo_every", (-1,), (0,)),
        (TrainConfig, "redo_tau", (-0.1,), (0.0,)),
        (EvaluateConfig, "split", ("train",), ("test", "validation")),
        (EvaluateConfig, "experiences", ("none",), ("auto", "all", "seen", "current")),
        (EvaluateConfig, "batch_size", (0,), (1,)),
        (EvaluateConfig, "train_images", (-1,), (0, 1)),
        (EvaluateConfig, "probe_images", (-1, 1), (0, 2)),
        (EvaluateConfig, "online", ("test",), ("train", "eval")),
        (EvaluateConfig, "every_steps", (-1,), (0, 1)),
        (EvaluateConfig, "every_images", (-1,), (0, 1)),
        (EvaluateConfig, "average_last", (0,), (1,)),
        (TrainConfig, "norms", ("none",), ("keep", "reset", "freeze", "per_experience")),
        (EvaluateConfig, "infer_task", ("nearest",), ("none", "entropy", "statistics")),
        (EvaluateConfig, "infer_task_per", ("domain",), ("image",)),
    ],
)
def test_a_stream_s_ranges(table: type[Any], key: str, bad: tuple[Any, ...], good: tuple[Any, ...]) -> None:
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            table(**{key: value})
        assert key in str(caught.value)
        assert str(value) in str(caught.value)
    for value in good:
        assert getattr(table(**{key: value}), key) == value


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_momentum_is_sgd_s_alone(optimizer: str) -> None:
    assert stream(train={"momentum": 0.9}).train.momentum == 0.9
    with pytest.raises(ConfigError, match=rf"train\.momentum is SGD's; {optimizer} has betas of its own"):
        stream(train={"optimizer": optimizer, "momentum": 0.9})


def test_an_optimizer_is_named_like_every_method() -> None:
    assert OPTIMIZERS.names == ("adam", "adamp", "adamw", "sgd", "sgdp", "upgd")
    assert stream(train={"optimizer": "Adam"}).train.optimizer == "adam"
    with pytest.raises(UnknownNameError, match=r"no optimizer named 'sdg'. Did you mean 'sgd'"):
        stream(train={"optimizer": "sdg"})


def test_every_key_of_a_stream_s_tables_is_checked_or_free() -> None:
    """A key that this file knows nothing of has come without a test of its range."""
    tables = [
        mark.args[1] for test in (test_a_stream_s_ranges,) for mark in test.pytestmark if mark.name == "parametrize"
    ]
    tested = {(table.__name__, key) for table, key, *_ in tables[0]}
    free = {("TrainConfig", key) for key in (
        "reset_optimizer", "project", "hyperspherical", "heads", "optimizer", "nesterov", "head", "scale_init"
    )}  # fmt: skip
    free.add(
        ("EvaluateConfig", "adaptation")
    )  # a list of methods, whose options tests/adaptation holds to their ranges
    for table in (TrainConfig, EvaluateConfig):
        assert {(table.__name__, key) for key in table.keys("continual")} <= tested | free


# What a scenario brings along -----------------------------------------------------------------------------------------


def test_a_scenario_brings_its_model_and_training_and_the_user_overrides_them() -> None:
    slim = stream(scenario={"name": "split-cifar10"})
    assert (slim.model.name, slim.model.width, slim.train.augment) == ("resnet18", 20, "crop_flip")
    wider = stream(scenario={"name": "split-cifar10"}, model={"width": 64}, train={"augment": "none"})
    assert (wider.model.name, wider.model.width, wider.train.augment) == ("resnet18", 64, "none")
    labels = stream(scenario={"name": "permuted_labels"}, train={"learning_rate": 0.1})
    assert (labels.learner.name, labels.model.name) == ("naive", "mlp")
    assert (labels.train.optimizer, labels.train.learning_rate) == ("adam", 0.1)


def test_a_scenario_s_width_goes_with_its_model() -> None:
    other = stream(scenario={"name": "split_cifar10"}, model={"name": "cnn"})
    assert (other.model.name, other.model.width, other.train.augment) == ("cnn", 0, "crop_flip")
    same = stream(scenario={"name": "split_cifar10"}, model={"name": "ResNet18"})
    assert (same.model.name, same.model.width) == ("resnet18", 20)
    assert same == stream(scenario={"name": "split_cifar10"})


def test_the_user_s_learner_takes_the_place_of_a_scenario_s() -> None:
    config = stream(scenario={"name": "random_labels"}, learner={"name": "er", "memory_size": 30})
    assert (config.learner.name, config.learner.options) == ("er", {"memory_size": 30})


@pytest.mark.parametrize("auto", [{}, {"norm": {}}, {"norm": {"name": "auto"}}, {"norm": {"name": "Auto"}}])
@pytest.mark.parametrize("scenario", SCENARIOS.names)
def test_auto_is_batch_normalization(auto: dict[str, Any], scenario: str) -> None:
    assert stream(scenario={"name": scenario}, **auto).norm.name == "batch_norm"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scenario": {"name": "split_digit"}}, "no scenario named 'split_digit'. Did you mean 'split_digits'"),
        ({"learner": {"name": "er-ase"}}, "no learner named 'er_ase'. Did you mean 'er_ace'"),
        ({"norm": {"name": "adab2m"}}, "no norm named 'adab2m'. Did you mean 'adab2n'"),
        ({"learner": {"name": "zzz"}}, r"no learner named 'zzz'. All \d+: fednorm list learners."),
    ],
)
def test_a_stream_s_unknown_names_come_with_the_nearest(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        stream(**values)


# What names a run -----------------------------------------------------------------------------------------------------


def named(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def test_a_stream_s_hash_is_of_what_differs_from_the_defaults() -> None:
    """Records of older versions keep their names; whoever changes a default changes this test."""
    norm = {"name": "batch_norm"}
    assert stream().hash == named({"kind": "continual", "model": {"width": 16}, "norm": norm})
    config = stream(seed=3, norm={"name": "adab2n", "kappa": 1}, train={"epochs": 1, "batch_size": 10})
    assert config.hash == named(
        {
            "kind": "continual",
            "seed": 3,
            "model": {"width": 16},
            "norm": {"name": "adab2n", "kappa": 1.0},
            "train": {"epochs": 1, "batch_size": 10},
        }
    )
    assert config.title == "er_ace-adab2n-split_digits-seed3"


@pytest.mark.parametrize(("section", "key"), [place for place in IMMATERIAL if place != ("model", "weights")])
def test_what_no_number_depends_on_names_no_run(section: str, key: str) -> None:
    other: dict[tuple[str, str], Any] = {
        ("data", "dir"): "/elsewhere",
        ("data", "download"): True,
        ("train", "checkpoint_every"): 7,
    }
    if (section, key) in other:
        changed = stream(**{section: {key: other[section, key]}})
        assert getattr(getattr(changed, section), key) == other[section, key]
        assert changed.hash == stream().hash
    else:  # a federated run's
        values: dict[str, Any] = {"min_answered": 0.5, "central_dir": "/elsewhere"}
        assert resolve({section: {key: values.get(key, 7)}}).hash == resolve({}).hash


def test_a_new_key_with_a_default_renames_no_run() -> None:
    config, defaults = (
        stream(train={"momentum": 0.5}),
        {**RunConfig.defaults("continual").to_dict(), "kind": "federated"},
    )
    values, newer = config.to_dict(), {**defaults, "train": {**defaults["train"], "lookahead": 0}, "extra": {"a": 1}}
    values = {**values, "train": {**values["train"], "lookahead": 0}, "extra": {"a": 1}}
    assert digest(values, newer, IMMATERIAL) == config.hash
    values["train"]["lookahead"] = 5
    assert digest(values, newer, IMMATERIAL) != config.hash


CHANGED: dict[str, Any] = {
    **{"seed": 2, "threads": 2, "data": {"validation": 0.1}, "scenario": {"num_experiences": 2}},
    **{"model": {"activation": "tanh"}, "norm": {"momentum": 0.2}, "learner": {"passes": "separate"}},
    **{f"train.{key}": {"train": {key: value}} for key, value in (
        ("optimizer", "adam"), ("learning_rate", 0.1), ("batch_size", 10), ("epochs", 1), ("momentum", 0.9),
        ("weight_decay", 0.1), ("agc", 0.1), ("augment", "crop"), ("rotate_degrees", 45.0), ("jitter", 0.2),
        ("schedule", "linear"), ("warmup_steps", 1),
        ("schedule_over", "experience"), ("final_rate", 0.1), ("reset_optimizer", True), ("project", True),
        ("decay", 0.9), ("decay_every", 2), ("clip_norm", 1.0), ("label_smoothing", 0.1), ("l2_init", 0.1),
        ("shrink", 0.5), ("perturb", 0.1), ("redo_every", 5), ("redo_tau", 0.1),
        ("cbp_rate", 0.1), ("cbp_maturity", 5), ("cbp_decay", 0.5), ("snr_eta", 0.1), ("snr_longest", 5),
        ("l2_scales", 0.1), ("weight_clip", 2.0), ("hyperspherical", True),
    )},
    "train.heads": {"train": {"heads": "task"}},
    "train.scale_init": {"train": {"scale_init": "uniform"}},
    "train.agc_on": {"train": {"agc_on": "linear", "agc": 0.1}},
    "train.nesterov": {"train": {"nesterov": True, "momentum": 0.9}},
    "train.wd_ratio": {"train": {"wd_ratio": 0.2, "optimizer": "sgdp"}},
    "train.delta": {"train": {"delta": 0.2, "optimizer": "adamp"}},
    "train.beta_utility": {"train": {"beta_utility": 0.5, "optimizer": "upgd"}},
    "train.sigma": {"train": {"sigma": 0.5, "optimizer": "upgd"}},
    "train.norms": {"train": {"norms": "reset"}},
    "train.trainable": {"train": {"trainable": "head"}},
    "train.head": {"train": {"trainable": "head", "head": "fc3"}},
    "train.linear_probe_epochs": {"train": {"linear_probe_epochs": 1}},
    **{f"evaluate.{key}": {"evaluate": {key: value}} for key, value in (
        ("split", "validation"), ("experiences", "seen"), ("batch_size", 10), ("train_images", 0), ("probe_images", 0),
        ("online", "eval"), ("every_steps", 5), ("every_images", 5), ("average_last", 3), ("infer_task", "entropy"),
    )},
    "evaluate.infer_task_per": {"evaluate": {"infer_task": "entropy", "infer_task_per": "batch"}},
}  # fmt: skip


def test_everything_else_names_another_run() -> None:
    hashes = {"nothing": stream().hash}
    for key, value in CHANGED.items():
        hashes[key] = stream(**(value if "." in key else {key: value})).hash
    assert len(set(hashes.values())) == len(hashes)
    tested = {key.partition(".")[2] for key in CHANGED if key.startswith("train.")} | {"checkpoint_every"}
    assert tested == set(TrainConfig.keys("continual"))


@pytest.mark.parametrize(
    ("section", "spelled_out"),
    [
        ("learner", {"name": "ER-ACE", "memory_size": 500, "passes": "joint", "task_free": False}),
        ("scenario", {"name": "split-digits", "num_experiences": 5, "class_order": "shuffled"}),
        ("norm", {"name": "batch-norm", "momentum": 0.1}),
    ],
)
def test_options_at_their_defaults_are_as_if_not_written(section: str, spelled_out: dict[str, Any]) -> None:
    assert stream(**{section: spelled_out}) == stream()
    name = spelled_out["name"]
    assert (
        stream(**{section: {"name": name, "options": {k: v for k, v in spelled_out.items() if k != "name"}}})
        == stream()
    )


def test_an_option_s_number_is_of_its_default_s_type_and_true_is_no_number() -> None:
    config = stream(learner={"name": "derpp", "alpha": 1}, norm={"name": "adab2n", "corrected": True})
    assert config.learner.options == {"alpha": 1.0}
    assert type(config.learner.options["alpha"]) is float
    assert config.norm.options == {"corrected": True}
    with pytest.raises(ConfigError, match=r"learner\.alpha must be a finite number; got True"):
        stream(learner={"name": "derpp", "alpha": True})


@given(
    st.sampled_from(SCENARIOS.names),
    st.sampled_from(LEARNERS.names),
    st.sampled_from(["auto", "adab2n", "nap", "group_norm"]),
    st.integers(0, 2**70),
    st.floats(1e-9, 1e9),
    st.sampled_from([{}, {"name": "cnn"}, {"width": 8}]),
)
def test_a_resolved_stream_resolves_to_itself(
    scenario: str, learner: str, norm: str, seed: int, rate: float, model: dict[str, Any]
) -> None:
    config = stream(
        scenario={"name": scenario},
        learner={"name": learner},
        norm={"name": norm},
        seed=seed,
        train={"learning_rate": rate},
        model=model,
    )
    again = resolve(json.loads(json.dumps(config.to_dict())))
    assert again == config == resolve(config.to_dict())
    assert again.hash == config.hash
    assert dataclasses.replace(config, seed=seed + 1).hash != config.hash
