"""The protocols of docs/how-to/protocols.md: each is a configuration, says what its text says, and runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fednorm.config import RunConfig, merge, resolve
from fednorm.federation.simulate import simulate

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "protocols.md"
BLOCKS = re.findall(r"```toml\n# ([\w-]+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PROTOCOLS = {name: tomllib.loads(text) for name, text in BLOCKS}
EVERY = pytest.mark.parametrize("name", PROTOCOLS)

SMALL: dict[str, Any] = {
    "data": {"name": "digits_mini", "image_size": 28, "merge": False, "domains": "scans,fonts", "test_per_domain": 6},
    "model": {"name": "digits_cnn", "width": 4},
    "rounds": {"num_rounds": 1, "evaluate_every": 1},
}
"""What makes a protocol's run a matter of seconds; how its clients train stays."""


def config_of(name: str) -> RunConfig:
    return resolve(PROTOCOLS[name])


def test_the_page_has_the_four_protocols() -> None:
    assert list(PROTOCOLS) == ["fedbn-office", "fedwon-office", "hbn-cifar10", "flgo-office"]
    assert len({config_of(name).hash for name in PROTOCOLS}) == 4


def test_fedbns_office_protocol_is_its_codes() -> None:
    config = config_of("fedbn-office")
    data, train = config.data, config.train
    held_back = round(data.validation * data.train_per_client)
    assert (held_back, data.train_per_client - held_back) == (50, 62)
    assert (data.image_size, data.normalize, data.merge) == (256, "none", True)
    assert (train.augment, train.rotate_degrees) == ("flip,rotate", 30)
    assert (train.optimizer, train.learning_rate, train.batch_size, train.local_epochs) == ("sgd", 0.01, 32, 1)
    assert (config.rounds.num_rounds, config.rounds.weighting, config.rounds.fraction) == (300, "equal", 1)
    assert config.evaluate.best_round


@pytest.mark.parametrize("name", ["hbn-cifar10", "flgo-office"])
def test_clip_and_decay_are_the_benchmarks(name: str) -> None:
    train = config_of(name).train
    assert (train.clip_norm, train.schedule, train.decay, train.warmup_steps) == (10, "exponential", 0.998, 0)


@EVERY
def test_a_protocol_runs(name: str) -> None:
    own = PROTOCOLS[name]
    small: dict[str, Any] = merge(SMALL, {"data": {"train_per_client": 16}, "train": {"batch_size": 8}})
    if "clients_per_domain" in own["data"]:
        small = merge(small, {"data": {"clients_per_domain": 2, "train_per_client": 24, "validation": 0.25}})
    config = resolve(merge(own, small))
    assert config.train == config_of(name).train.replace(batch_size=8)
    result = simulate(config, runs=None)
    best = result["final"]["best_round"]
    assert best["round"] == result["final"]["round"] == 1
    assert best["per_domain"] == result["final"]["per_domain"]
    assert 0 <= best["validation_mean"] <= 1
