"""Clients that are scored in one pass have the scores of one by one, to the bit, or are scored one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from torch import Tensor, nn

from fednorm.config import resolve
from fednorm.data.domain import Client, Federation, Split
from fednorm.federation import together
from fednorm.federation.client import score
from fednorm.federation.executors import Answer, Failure, Job
from fednorm.federation.executors.sequential import Sequential, answer
from fednorm.federation.together import Together
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import Workbench

SIZES = [16, 17, 5, 0, 40] + [16, 17, 5] * 5
"""Test images of each client: from 16 on most processors add up alike, below many do not."""


def drawn(count: int, seed: int, size: int = 8) -> Split:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count + 3, 3, size, size), dtype=torch.uint8, generator=draw)
    return Split(images, torch.randint(0, 3, (count + 3,), generator=draw), torch.arange(count))


def one_array(sizes: list[int]) -> Iterator[Split]:
    """Yield splits of one array, as those of a domain's clients are."""
    whole, begin = drawn(sum(sizes), 1), 0
    for size in sizes:
        yield replace(whole, index=torch.arange(begin, begin + size))
        begin += size


def bench_of(
    tests: list[Split], strategy: str = "fedavg", model: dict[str, Any] | None = None, **evaluate: Any
) -> Workbench:
    config = {
        "model": {"name": "digits_cnn", "width": 4} | (model or {}),
        "strategy": {"name": strategy},
        "train": {"batch_size": 4, "learning_rate": 0.05},
        "evaluate": evaluate,
    }
    held_back = drawn(6, 2) if evaluate else drawn(0, 2)
    clients = tuple(Client(pid, "synthetic", drawn(5, 3), held_back, test) for pid, test in enumerate(tests))
    return Workbench(resolve(config), Federation("synthetic", 3, 8, clients))


def evaluations(bench: Workbench, **config: Any) -> list[Job]:
    """Return what every client is asked in a round's evaluation, after a client has trained."""
    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    content = RecordDict({"arrays": bench.strategy.initial_arrays(bench.model), "config": ConfigRecord()})
    trained = answer(bench, Job("train", 0, content, context))
    assert not isinstance(trained, Failure)
    sent = RecordDict({"arrays": pack(unpack(trained.array_records["arrays"])), "config": ConfigRecord(config)})
    return [
        Job("evaluate", pid, sent, Context(1, pid + 2, {"partition-id": pid}, RecordDict(), {}))
        for pid in range(len(bench.federation.clients))
    ]


def metrics(answers: Iterator[Answer]) -> list[dict[str, Any]]:
    return [dict(each.metric_records["metrics"]) for each in answers if not isinstance(each, Failure)]


def alone(bench: Workbench, jobs: list[Job]) -> list[dict[str, Any]]:
    return metrics(answer(bench, job) for job in jobs)


Splits = Callable[[list[int]], Iterator[Split]]


@pytest.mark.parametrize("evaluate", [{}, {"best_round": True}, {"split": "validation"}, {"batch_size": 16}], ids=str)
@pytest.mark.parametrize(
    "splits",
    [one_array, lambda sizes: (drawn(size, seed) for seed, size in enumerate(sizes))],
    ids=["one array", "many"],
)
@pytest.mark.parametrize("strategy", ["fedavg", "fedwon", "fedbn"])
def test_clients_of_any_sizes_have_the_scores_of_one_by_one(
    strategy: str, splits: Splits, evaluate: dict[str, Any]
) -> None:
    bench = bench_of(list(splits(SIZES)), strategy, **evaluate)
    jobs = evaluations(bench)
    assert metrics(Sequential(bench).run(jobs)) == alone(bench, jobs)


@pytest.mark.parametrize("same", [True, False])
def test_a_trial_of_each_shape_decides(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(together, "_tried", lambda _, __, *shape: asked.append(shape) or same)
    bench = bench_of(list(one_array(SIZES)))
    jobs = evaluations(bench)
    executor, sizes = Sequential(bench), []
    bench.model.register_forward_hook(lambda _, images, __: sizes.append(len(images[0])))
    for _ in range(2):
        assert len(metrics(executor.run(jobs))) == len(jobs)
    counts = {count: SIZES.count(count) for count in set(SIZES)}
    several = {count: clients for count, clients in counts.items() if count and clients > 1}
    assert sorted(asked) == sorted(several.items()), "once each"
    if same:
        assert sorted(sizes) == sorted([40, *(count * clients for count, clients in several.items())] * 2)
    else:
        assert sorted(sizes) == sorted([count for count in SIZES if count] * 2)


class Coupled(nn.Sequential):
    """A network whose images change each other's logits while it is evaluated; of layers of PyTorch's alone."""

    def __init__(self, head: float) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
        self.append(nn.Linear(4 * 36, 3))
        with torch.no_grad():
            for parameter in self[-1].parameters():
                parameter.mul_(head)


@pytest.mark.parametrize("head", [1.0, 0.0], ids=["drawn head", "zero head"])
def test_images_that_change_each_others_logits_are_not_put_together(head: float) -> None:
    images = torch.randn(1, 3, 8, 8)
    assert not together._tried(nn.Sequential(*Coupled(head)), images, 16, 4)
    apart = nn.Sequential(nn.Flatten(), nn.ReLU())  # each value by itself, so that every processor gives its bits
    assert together._tried(apart, images, 16, 4)
    assert not together._tried(nn.Sequential(apart, nn.Threshold(1e9, 0.0)), images, 16, 4), (
        "a trial that tells nothing"
    )


def test_a_shape_is_tried_on_drawn_tensors_and_nothing_of_the_run_changes() -> None:
    bench = bench_of(list(one_array([16] * 6)))
    with torch.no_grad():
        bench.model.get_parameter("fc3.weight").zero_()
    before = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    state = torch.get_rng_state()
    images, _ = bench.federation.clients[0].test.inputs(torch.arange(1))
    first = together._tried(bench.model, images, 16, 6)
    assert first == together._tried(bench.model, images, 16, 6)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], tensor) for key, tensor in bench.model.state_dict().items())


class Ours(nn.Linear):
    """A layer of a user's."""


def test_a_users_layers_are_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(list(one_array([16] * 6)))
    old = bench.model.get_submodule("fc3")
    assert isinstance(old, nn.Linear)
    bench.model.set_submodule("fc3", Ours(old.in_features, old.out_features))
    monkeypatch.setattr(together, "_tried", lambda *_: True)
    bench.model.eval()
    assert Together(bench).scores([client.test for client in bench.federation.clients]) == [None] * 6


def test_a_network_that_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(list(one_array([16] * 6)))
    monkeypatch.setattr(together, "_tried", lambda *_: True)
    tests = [client.test for client in bench.federation.clients]
    with torch.no_grad():
        bench.model.get_parameter("fc3.bias").fill_(float("nan"))
    bench.model.eval()
    assert str(Together(bench).scores(tests)) == str([score(bench, test) for test in tests])


def test_a_pass_that_fails_fails_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(list(one_array([16] * 6)))
    monkeypatch.setattr(together, "_tried", lambda *_: True)

    def fails(_: Any, images: tuple[Tensor]) -> None:
        if len(images[0]) > 16:
            raise MemoryError("too many")

    jobs = evaluations(bench)
    bench.model.register_forward_pre_hook(fails)
    assert metrics(Sequential(bench).run(jobs)) == alone(bench, jobs)
