"""How long a run will take: what is counted, what is timed, and whether it comes true."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fednorm.config import merge, resolve
from fednorm.data import load_federation
from fednorm.data.published import windows
from fednorm.errors import DataError
from fednorm.federation import estimate as of_rounds
from fednorm.federation.simulate import simulate as simulate_rounds
from fednorm.federation.workbench import Workbench
from fednorm.streams import estimate as of_streams
from fednorm.streams.simulate import simulate as simulate_stream
from fednorm.study import estimate
from fednorm.study.estimate import estimate_seconds, seconds_at_once
from fednorm.training.work import Work

Values = dict[str, Any]

OFFICE: Values = {
    "data": {"name": "office_caltech10", "merge": True, "train_per_client": 62},
    "model": {"name": "mlp"},
    "rounds": {"num_rounds": 25, "evaluate_every": 10},
}
STREAM: Values = {
    "kind": "continual",
    "scenario": {"name": "split_cifar10"},
    "data": {"image_size": 8},
    "model": {"name": "digits_cnn", "width": 4},
    "train": {"batch_size": 10, "epochs": 2},
    "evaluate": {"experiences": "seen", "train_images": 100, "probe_images": 0},
}
ROUNDS, TRAINED, SCORED = 25, 25 * 4 * 62, 192 + 225 + 32 + 59
"""Of Office without a folder: four clients of 62 images, and FedBN's test images."""


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Forget what other tests have timed and counted."""
    yield
    estimate._data.cache_clear()
    estimate._each.cache_clear()


@pytest.fixture
def costing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Let each of a run's work cost what a test says; returns the data of which it was asked."""

    def cost(**each: float) -> list[Any]:
        asked: list[Any] = []
        for way in (of_rounds, of_streams):
            monkeypatch.setattr(way, "measure", lambda _, data: asked.append(data) or Work(**each))
        return asked

    return cost


def seconds(values: Values, **changes: Any) -> float:
    return estimate_seconds(resolve(merge(values, changes))).seconds


# Counted --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, TRAINED),
        ({"train": {"local_epochs": 3}}, 3 * TRAINED),
        ({"rounds": {"fraction": 0.5}}, TRAINED / 2),
        ({"data": {"validation": 0.5}}, TRAINED / 2),
        ({"strategy": {"name": "centralized"}, "train": {"local_steps": 10}}, ROUNDS * (248 + 2 * 32)),  # of one
        # Fine-tuning: before the evaluations after rounds 10, 20 and 25. A model of its own: in every round.
        ({"strategy": {"name": "fedavg_ft", "finetune_epochs": 2}}, TRAINED + 3 * 2 * 4 * 62),
        ({"strategy": {"name": "fedbabu"}}, TRAINED + 3 * 5 * 4 * 62),
        ({"strategy": {"name": "ditto", "personal_epochs": 3}}, TRAINED + 3 * TRAINED),
        ({"strategy": {"name": "fedrep", "head_epochs": 6}}, TRAINED + 2 * TRAINED),  # a head's pass is a third of one
    ],
)
def test_images_trained_on_by_hand(costing: Callable[..., list[Any]], changes: Values, images: float) -> None:
    costing(trained=1.0)
    assert seconds(OFFICE, **changes) == images


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 3 * SCORED),
        ({"evaluate": {"kinds": ["own", "pooled", "cross"]}}, (3 + 1 + 4) * SCORED),
        ({"evaluate": {"split": "validation"}, "data": {"validation": 0.5}}, 3 * 4 * 31),
        ({"data": {"held_out": "amazon"}}, 3 * SCORED),
        ({"evaluate": {"best_round": True}, "data": {"validation": 0.5}}, 3 * (SCORED + 4 * 31)),
        ({"strategy": {"name": "hbn"}}, 3 * SCORED + ROUNDS * 4 * 2 * 64),  # both of its measurements
    ],
)
def test_images_scored_by_hand(costing: Callable[..., list[Any]], changes: Values, images: int) -> None:
    costing(scored=1.0)
    assert seconds(OFFICE, **changes) == images


def test_copies_by_hand(costing: Callable[..., list[Any]]) -> None:
    costing(turns=1.0)
    assert seconds(OFFICE) == ROUNDS * 4 * of_rounds.COPIES + 3 * 4


def test_the_published_digits_are_those_of_fedbn(costing: Callable[..., list[Any]]) -> None:
    """743 images a client, and 20 per cent of each domain's images: 14,000, 19,858, 1,860, 97,791; MNIST-M 68,002."""
    config = resolve({"data": {"name": "digits", "merge": True, "train_per_client": 743}, "rounds": {"num_rounds": 1}})
    (clients,) = (costing(trained=1.0, scored=1e6),)
    images = 14_000 + 19_858 + 1_860 + 97_791 + 68_002 / 5
    assert estimate_seconds(config).seconds == pytest.approx(5 * 743 + 1e6 * images, abs=3e6)
    assert "Published sizes" in estimate_seconds(config).basis
    assert [len(client.train) for client in clients[0].clients] == [743] * 5


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 5 * 2 * 10_000),  # split CIFAR-10 without a folder: five experiences, 2,000 test images each
        ({"scenario": {"train_per_experience": 1234}}, 5 * 2 * 1234),
        ({"data": {"validation": 0.1}}, 5 * 2 * 9000),
        ({"learner": {"name": "joint"}}, 2 * 50_000),
    ],
)
def test_streams_by_hand(costing: Callable[..., list[Any]], changes: Values, images: int) -> None:
    costing(trained=1.0)
    assert seconds(STREAM, **changes) == images


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, (1 + 2 + 3 + 4 + 5) * 2000 + 5 * 100),
        ({"evaluate": {"experiences": "current"}}, 5 * 2000 + 5 * 100),
        ({"evaluate": {"experiences": "all"}}, (1 + 5) * 5 * 2000 + 5 * 100),  # and the untrained model
        ({"evaluate": {"experiences": "current", "train_images": 0, "probe_images": 8}}, 5 * (2000 + 10_000 + 2 * 8)),
        ({"learner": {"name": "joint"}}, 2 * 5 * 2000 + 100),  # and the untrained model: all are scored
        ({"evaluate": {"split": "validation"}, "data": {"validation": 0.1}}, (1 + 2 + 3 + 4 + 5) * 1000 + 5 * 100),
        ({"evaluate": {"online": "eval"}}, 15 * 2000 + 5 * 100 + 2 * 50_000),
        # 2,000 steps an experience: points after 1,000 of them, and at its end, where the line itself is one.
        ({"evaluate": {"every_steps": 1000}}, 2 * 15 * 2000 + 5 * 100),
        ({"evaluate": {"every_steps": 1000, "every_images": 50}}, 15 * 2000 + 5 * 100 + 2 * 15 * 50),
    ],
)
def test_scored_images_of_streams_by_hand(costing: Callable[..., list[Any]], changes: Values, images: int) -> None:
    costing(scored=1.0)
    assert seconds(STREAM, **changes) == images


def test_a_memorization_stream_scores_the_present_experience(costing: Callable[..., list[Any]]) -> None:
    costing(scored=1.0, turns=1000.0)
    values: Values = {
        "kind": "continual",
        "scenario": {"name": "random_labels", "num_experiences": 3, "train_per_experience": 64},
        "data": {"name": "cifar10", "image_size": 8},
        "evaluate": {"train_images": 50, "probe_images": 0},
    }
    assert seconds(values) == 3 * (64 + 50) + 3 * 1000


def test_embedded_data_is_counted(costing: Callable[..., list[Any]]) -> None:
    costing(trained=1.0)
    config = resolve({"rounds": {"num_rounds": 2}, "model": {"width": 4}})
    clients = load_federation(config.data, image_size=28, seed=config.seed).clients
    assert estimate_seconds(config).seconds == 2 * sum(len(client.train) for client in clients)
    assert "embedded" in estimate_seconds(config).basis


def test_a_folder_is_counted_and_nothing_downloaded(costing: Callable[..., list[Any]], tmp_path: Path) -> None:
    for split, each in (("train", 7), ("test", 3)):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        labels = [row % 10 for row in range(10 * each)]
        table = pa.table({"img": [{"bytes": buffer.getvalue(), "path": None}] * len(labels), "label": labels})
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet")
    costing(trained=1.0)
    there = merge(STREAM, {"data": {"dir": str(tmp_path), "download": True}})
    assert seconds(there) == 5 * 2 * 14
    assert estimate_seconds(resolve(there)).basis == f"Images counted in {tmp_path}."
    lacking = resolve(merge(there, {"scenario": {"name": "split_cifar100"}}))
    assert estimate_seconds(lacking).seconds == 10 * 2 * 5000
    assert "Published sizes" in estimate_seconds(lacking).basis


def test_sizes_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name its folder with --data-dir"):
        estimate_seconds(resolve({"data": {"name": "folders", "domains": ["mine"]}}))
    with pytest.raises(DataError, match="does not exist"):
        estimate_seconds(resolve({"data": {"name": "folders", "domains": ["mine"], "dir": str(tmp_path / "no")}}))


# Timed ----------------------------------------------------------------------------------------------------------------


def test_steps_that_cost_the_same_are_timed_once(costing: Callable[..., list[Any]]) -> None:
    asked = costing(trained=1.0)
    for seed in (1, 2):
        for rate in (0.01, 0.1):
            seconds(OFFICE, seed=seed, train={"learning_rate": rate, "agc": 0.1 * seed}, rounds={"num_rounds": seed})
    for kappa in (0.1, 0.5, 0.7):  # 0.5 is the default
        seconds(STREAM, norm={"name": "adab2n", "kappa": kappa})
    assert len(asked) == 2
    seconds(OFFICE, train={"agc": 0.1, "batch_size": 2})
    seconds(OFFICE, norm={"name": "group_norm"}, train={"agc": 0.1})
    seconds(STREAM, norm={"name": "adab2n", "corrected": True})
    seconds(STREAM, norm={"name": "batch_norm"}, learner={"passes": "separate"})
    assert len(asked) == 6


def test_timing_leaves_the_model_and_the_generator_alone() -> None:
    bench = Workbench(resolve({"data": {"train_per_client": 40}, "model": {"width": 4}, "strategy": {"name": "ditto"}}))
    model = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    random = torch.random.get_rng_state()
    each = of_rounds.cost(bench)
    assert min(each.trained, each.scored, each.turns) > 0
    assert all(torch.equal(tensor, model[key]) for key, tensor in bench.model.state_dict().items())
    assert seconds(STREAM, learner={"name": "er"}) > 0
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.few(1)
@pytest.mark.parametrize("learner", ["joint", "er_ace", "ewc", "gdumb"])
def test_learners_are_timed(learner: str) -> None:
    own = {"memory_size": 20, "memory_epochs": 1} if learner == "gdumb" else {}
    assert 0 < seconds(STREAM, learner={"name": learner, **own}, train={"epochs": 1}) < 36_000


def test_an_experience_of_one_step_is_timed() -> None:
    tiny = {"name": "split_cifar10", "train_per_experience": 4}
    assert 0 < seconds(STREAM, scenario=tiny, train={"epochs": 1}) < 600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "epochs"), [("fedavg", 1), ("fedavg", 4), ("fedavg_ft", 1), ("ditto", 2), ("fedrep", 1)]
)
def test_an_estimate_of_rounds_is_counted_and_timed(strategy: str, epochs: int) -> None:
    values = {"data": {"train_per_client": 128, "test_per_domain": 64}, "model": {"width": 16}}
    own = {"strategy": {"name": strategy}, "train": {"local_epochs": epochs}}
    _is_counted_and_timed({**values, **own, "rounds": {"num_rounds": 3}}, simulate_rounds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "options"), [("er", {}), ("gdumb", {"memory_size": 100, "memory_epochs": 8}), ("ewc", {})]
)
def test_an_estimate_of_a_stream_is_counted_and_timed(learner: str, options: Values) -> None:
    scenario = {"name": "split_digits", "train_per_experience": 100, "test_per_experience": 50}
    values = {"kind": "continual", "scenario": scenario, "model": {"name": "digits_cnn", "width": 16}}
    _is_counted_and_timed(
        {**values, "learner": {"name": learner, **options}, "train": {"epochs": 2, "batch_size": 10}}, simulate_stream
    )


def _is_counted_and_timed(values: Values, simulate: Callable[..., Any]) -> None:
    """How near it comes is measured, not tested: a loaded machine has no time that a test could hold it to."""
    config = resolve(values)
    assert simulate(config, runs=None)["final"]
    assert 0 < estimate_seconds(config).seconds < math.inf


def test_blank_images_differ_and_take_no_room() -> None:
    images = windows(100_000, 32)
    assert images.shape == (100_000, 3, 32, 32)
    assert images.base is not None
    assert len({images[row].tobytes() for row in (0, 1, 2, 99_999)}) == 4
    assert images[:32].std() > 60  # of uniform bytes: 73.9


def test_runs_at_once() -> None:
    assert seconds_at_once([], 2) == 0
    assert seconds_at_once([3, 3, 3, 3], 2) == 6
    assert seconds_at_once([10, 1, 1], 4) == 10
