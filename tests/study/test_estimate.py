"""How long a run will take: what is timed, what is counted, and whether it comes true."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fednorm.config import DataConfig, merge, resolve
from fednorm.data import load_federation
from fednorm.errors import DataError
from fednorm.federation import estimate as of_rounds
from fednorm.federation.simulate import simulate as simulate_rounds
from fednorm.federation.workbench import Workbench
from fednorm.streams import estimate as of_streams
from fednorm.streams.simulate import simulate as simulate_stream
from fednorm.study import estimate
from fednorm.study.estimate import estimate_seconds, seconds_at_once

Values = dict[str, Any]

OFFICE: Values = {"data": {"name": "office_caltech10", "merge": True, "train_per_client": 62}, "model": {"name": "mlp"}}
STREAM: Values = {
    "kind": "continual",
    "scenario": {"name": "split_cifar10"},
    "data": {"image_size": 8},
    "model": {"name": "digits_cnn", "width": 4},
    "train": {"batch_size": 10, "epochs": 2},
    "evaluate": {"experiences": "seen", "train_images": 100, "probe_images": 0},
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what other tests have timed and counted."""
    monkeypatch.setenv("FEDNORM_CACHE", str(tmp_path_factory.getbasetemp() / "estimate-cache"))
    kept = (estimate._federation, estimate._stream, estimate._round_rates, estimate._step_rates)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


@pytest.fixture
def rounds_cost(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Workbench]]:
    """Let the parts of a round cost what a test says; returns the workbenches that were timed."""

    def cost(train: float = 0.0, test: float = 0.0, copy: float = 0.0) -> list[Workbench]:
        timed: list[Workbench] = []

        def measure(bench: Workbench) -> of_rounds.Rates:
            timed.append(bench)
            return of_rounds.Rates(train, test, copy)

        monkeypatch.setattr(of_rounds, "measure", measure)
        return timed

    return cost


@pytest.fixture
def steps_cost(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Let the parts of a stream's run cost what a test says; returns the workbenches that were timed."""

    def cost(step: float = 0.0, end: float = 0.0, image: float = 0.0) -> list[Any]:
        timed: list[Any] = []

        def measure(bench: Any) -> of_streams.Rates:
            timed.append(bench)
            return of_streams.Rates(step, end, image)

        monkeypatch.setattr(of_streams, "measure", measure)
        return timed

    return cost


def seconds(values: Values, **changes: Any) -> float:
    return estimate_seconds(resolve(merge(values, changes))).seconds


# Counted --------------------------------------------------------------------------------------------------------------


def test_rounds_by_hand(rounds_cost: Callable[..., list[Workbench]]) -> None:
    """Office without a folder: four clients of 62 images; FedBN's 192 + 225 + 32 + 59 test images."""
    rounds_cost(train=1.0)
    office = merge(OFFICE, {"rounds": {"num_rounds": 300, "evaluate_every": 10}})
    assert seconds(office) == 300 * 4 * 62
    assert seconds(office, train={"local_epochs": 3}) == 3 * 300 * 4 * 62
    assert seconds(office, rounds={"fraction": 0.5}) == 150 * 4 * 62
    assert seconds(office, data={"validation": 0.5}) == 300 * 4 * 31


def test_evaluations_by_hand(rounds_cost: Callable[..., list[Workbench]]) -> None:
    rounds_cost(test=1.0)
    office = merge(OFFICE, {"rounds": {"num_rounds": 25, "evaluate_every": 10}})
    assert seconds(office) == 3 * 508  # after rounds 10, 20 and 25
    assert seconds(office, evaluate={"kinds": ["own", "pooled", "cross"]}) == (3 + 1 + 4) * 508
    held_back = {"evaluate": {"split": "validation"}, "data": {"validation": 0.5}}
    assert seconds(office, **held_back) == 3 * 4 * 31


def test_copies_by_hand(rounds_cost: Callable[..., list[Workbench]]) -> None:
    rounds_cost(copy=1.0)
    office = merge(OFFICE, {"rounds": {"num_rounds": 25, "evaluate_every": 10}})
    assert seconds(office) == 25 * 4 * of_rounds.COPIES + 3 * 4


def test_the_published_digits_are_those_of_fedbn(rounds_cost: Callable[..., list[Workbench]]) -> None:
    """743 images a client, and 20 per cent of each domain's images: 14,000, 19,858, 1,860, 97,791; MNIST-M 68,002."""
    config = resolve({"data": {"name": "digits", "merge": True, "train_per_client": 743}, "rounds": {"num_rounds": 1}})
    rounds_cost(train=1.0)
    assert estimate_seconds(config).seconds == 5 * 743
    estimate._round_rates.cache_clear()
    rounds_cost(test=1.0)
    assert estimate_seconds(config).seconds == pytest.approx(14_000 + 19_858 + 1_860 + 97_791 + 68_002 / 5, abs=3)
    assert "Published sizes" in estimate_seconds(config).basis


def test_streams_by_hand(steps_cost: Callable[..., list[Any]]) -> None:
    """Split CIFAR-10 without a folder: five experiences of 10,000 images, 2,000 test images each."""
    steps_cost(step=1.0)
    assert seconds(STREAM) == 5 * 2 * 1000
    assert seconds(STREAM, train={"batch_size": 64}) == 5 * 2 * 157  # 10,000 / 64 = 156.25
    assert seconds(STREAM, scenario={"train_per_experience": 1234}) == 5 * 2 * 124
    assert seconds(STREAM, data={"validation": 0.1}) == 5 * 2 * 900
    assert seconds(STREAM, learner={"name": "joint"}) == 2 * 5000


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, (1 + 2 + 3 + 4 + 5) * 2000 + 5 * 100),
        ({"evaluate": {"experiences": "current"}}, 5 * 2000 + 5 * 100),
        ({"evaluate": {"experiences": "all"}}, (1 + 5) * 5 * 2000 + 5 * 100),  # and the untrained model
        ({"evaluate": {"experiences": "current", "train_images": 0, "probe_images": 8}}, 5 * (2000 + 10_000 + 2 * 8)),
        ({"learner": {"name": "joint"}}, 5 * 2000 + 100),
        ({"evaluate": {"split": "validation"}, "data": {"validation": 0.1}}, (1 + 2 + 3 + 4 + 5) * 1000 + 5 * 100),
    ],
)
def test_scored_images_by_hand(steps_cost: Callable[..., list[Any]], changes: Values, images: int) -> None:
    steps_cost(image=1.0)
    assert seconds(STREAM, **changes) == images


def test_a_memorization_stream_scores_the_present_experience(steps_cost: Callable[..., list[Any]]) -> None:
    steps_cost(image=1.0, end=1000.0)
    values: Values = {
        "kind": "continual",
        "scenario": {"name": "random_labels", "num_experiences": 3, "train_per_experience": 64},
        "data": {"name": "cifar10", "image_size": 8},
        "evaluate": {"train_images": 50, "probe_images": 0},
    }
    assert seconds(values) == 3 * (64 + 50) + 3 * 1000


def test_embedded_data_is_counted(rounds_cost: Callable[..., list[Workbench]]) -> None:
    rounds_cost(train=1.0)
    config = resolve({"rounds": {"num_rounds": 2}, "model": {"width": 4}})
    clients = load_federation(config.data, image_size=28, seed=config.seed).clients
    assert estimate_seconds(config).seconds == 2 * sum(len(client.train) for client in clients)
    assert "embedded" in estimate_seconds(config).basis


def test_a_folder_is_counted(steps_cost: Callable[..., list[Any]], tmp_path: Path) -> None:
    for split, each in (("train", 7), ("test", 3)):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        labels = [row % 10 for row in range(10 * each)]
        table = pa.table({"img": [{"bytes": buffer.getvalue(), "path": None}] * len(labels), "label": labels})
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet")
    steps_cost(step=1.0)
    there = resolve(merge(STREAM, {"data": {"dir": str(tmp_path)}}))
    assert estimate_seconds(there).seconds == 5 * 2 * 2  # 14 images an experience
    assert estimate_seconds(there).basis == f"Images counted in {tmp_path}."
    lacking = resolve(merge(STREAM, {"data": {"dir": str(tmp_path)}, "scenario": {"name": "split_cifar100"}}))
    assert estimate_seconds(lacking).seconds == 10 * 2 * 500
    assert "Published sizes" in estimate_seconds(lacking).basis


def test_sizes_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name its folder with --data-dir"):
        estimate_seconds(resolve({"data": {"name": "folders", "domains": ["mine"]}}))
    with pytest.raises(DataError, match="does not exist"):
        estimate_seconds(resolve({"data": {"name": "folders", "domains": ["mine"], "dir": str(tmp_path / "no")}}))


def test_nothing_is_downloaded(
    rounds_cost: Callable[..., list[Workbench]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load(data: DataConfig, **_: Any) -> Any:
        asked.append(data.download)
        raise DataError("not there")

    monkeypatch.setattr(estimate, "load_federation", load)
    rounds_cost(train=1.0)
    config = resolve({"data": {"name": "cifar10", "dir": str(tmp_path), "download": True}, "model": {"name": "mlp"}})
    assert estimate_seconds(config).seconds == 10 * 50_000
    assert asked == [False]


def test_a_held_out_domain_is_scored_and_not_trained_on(rounds_cost: Callable[..., list[Workbench]]) -> None:
    timed = rounds_cost(train=1.0, test=1000.0)
    held_out = {"data": {"held_out": "amazon", "clients_per_domain": 2, "train_per_client": 31}}
    assert seconds(OFFICE, rounds={"num_rounds": 1}, **held_out) == 3 * 62 + 508_000
    assert [client.domain for client in timed[0].federation.clients][-2:] == ["webcam", "amazon"]


# Timed ----------------------------------------------------------------------------------------------------------------


def test_steps_that_cost_the_same_are_timed_once(rounds_cost: Callable[..., list[Workbench]]) -> None:
    timed = rounds_cost(train=1.0)
    for seed in (1, 2):
        for rate in (0.01, 0.1):
            seconds(OFFICE, seed=seed, train={"learning_rate": rate, "agc": 0.1 * seed}, rounds={"num_rounds": seed})
    assert len(timed) == 1
    seconds(OFFICE, train={"agc": 0.1, "batch_size": 2})
    seconds(OFFICE, train={"batch_size": 32})
    seconds(OFFICE, norm={"name": "group_norm"}, train={"agc": 0.1})
    seconds(OFFICE, norm={"name": "group_norm", "num_groups": 2}, train={"agc": 0.2})
    assert len(timed) == 4
    assert {bench.config.norm.name for bench in timed} == {"batch_norm", "group_norm"}


def test_a_learners_passes_are_timed_apart(steps_cost: Callable[..., list[Any]]) -> None:
    timed = steps_cost(step=1.0)
    for kappa in (0.1, 0.5, 0.7):  # 0.5 is the default
        seconds(STREAM, norm={"name": "adab2n", "kappa": kappa}, learner={"memory_size": int(1000 * kappa)})
    assert len(timed) == 1
    seconds(STREAM, norm={"name": "adab2n", "corrected": True})
    seconds(STREAM, norm={"name": "batch_norm"}, learner={"passes": "separate"})
    seconds(STREAM, norm={"name": "batch_norm"}, learner={"passes": "joint"})
    assert len(timed) == 4


def test_timing_leaves_the_model_and_the_generator_alone() -> None:
    config = resolve({"data": {"train_per_client": 40}, "model": {"width": 4}, "norm": {"name": "batch_norm"}})
    bench = Workbench(config)
    model = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    random = torch.random.get_rng_state()
    rates = of_rounds.measure(bench)
    assert min(rates.train, rates.test, rates.copy) > 0
    assert all(torch.equal(tensor, model[key]) for key, tensor in bench.model.state_dict().items())
    assert seconds(STREAM, learner={"name": "er"}) > 0
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("learner", ["naive", "joint", "er", "er_ace", "derpp", "lwf", "ewc", "gdumb"])
def test_every_learner_is_timed(learner: str) -> None:
    own = {"memory_size": 20, "memory_epochs": 1} if learner == "gdumb" else {}
    assert 0 < seconds(STREAM, learner={"name": learner, **own}, train={"epochs": 1}) < 36_000


def test_an_experience_of_one_step_is_timed() -> None:
    tiny = {"name": "split_cifar10", "train_per_experience": 4}
    assert 0 < seconds(STREAM, scenario=tiny, train={"epochs": 1}) < 600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "simulate"),
    [
        (
            {
                "data": {"train_per_client": 128, "test_per_domain": 64},
                "model": {"width": 16},
                "rounds": {"num_rounds": 3},
            },
            simulate_rounds,
        ),
        (
            {
                "kind": "continual",
                "scenario": {"name": "split_digits", "train_per_experience": 100, "test_per_experience": 50},
                "model": {"name": "digits_cnn", "width": 16},
                "learner": {"name": "er"},
                "train": {"epochs": 2, "batch_size": 10},
            },
            simulate_stream,
        ),
    ],
)
def test_an_estimate_comes_true(values: Values, simulate: Callable[..., Any]) -> None:
    config = resolve(values)
    simulate(config, runs=None)  # what is read and compiled once
    estimated = estimate_seconds(config).seconds
    began = time.process_time()
    simulate(config, runs=None)
    assert 0.4 < estimated / (time.process_time() - began) < 2.5


def test_blank_images_differ_and_take_no_room() -> None:
    images = estimate._windows(100_000, 32)
    assert images.shape == (100_000, 3, 32, 32)
    assert images.base is not None
    assert len({images[row].tobytes() for row in (0, 1, 2, 99_999)}) == 4
    assert images[:32].std() > 60  # of uniform bytes: 73.9


def test_runs_at_once() -> None:
    assert seconds_at_once([], 2) == 0
    assert seconds_at_once([3, 3, 3, 3], 2) == 6
    assert seconds_at_once([10, 1, 1], 4) == 10
