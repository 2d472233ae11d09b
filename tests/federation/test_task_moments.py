"""Moments by client and task: the law written out, what a client keeps, and the two equalities."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.cards import NORMS
from fednorm.config import resolve
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.plan import norm_plan
from fednorm.federation.simulate import simulate
from fednorm.federation.task_moments import COUNT, MEAN, SHARE, VAR, TaskPool, _Kept
from fednorm.federation.workbench import workbench_of
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.roles import RoleRule
from fednorm.streams.simulate import simulate as learn
from strategies.fedavg import FedAvg

NAMES = ("adab2n", "task_balanced_norm")
C = 3


def layer(name: str, num_tasks: int = 2) -> Any:
    norm = NORMS[name].made({"num_tasks": num_tasks} if name == "adab2n" else {"batch_ratio": 1})
    return norm.layer(C, 2)


def pool_of(model: torch.nn.Module) -> TaskPool:
    return TaskPool(norm_plan(model, RoleRule()))


def reply(samples: dict[int, Tensor], shares: Tensor, num_tasks: int = 2) -> dict[str, Tensor]:
    """Moments of each task's samples, shape (n, C), as a client sends them."""
    mean, var, count = torch.zeros(num_tasks, C), torch.ones(num_tasks, C), torch.zeros(num_tasks)
    for task, rows in samples.items():
        mean[task], var[task], count[task] = rows.mean(0), rows.var(0, correction=0), len(rows)
    return {f"0.{MEAN}": mean, f"0.{VAR}": var, f"0.{COUNT}": count, f"0.{SHARE}": shares}


def test_merging_is_that_of_all_samples_together() -> None:
    """With shares as the counts have them: two clients, two tasks, of which one client has one alone."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (5 * k + torch.randn(n, C, generator=generator) * (k + 1) for k, n in enumerate((8, 5, 16)))
    pool = pool_of(torch.nn.Sequential(layer("adab2n")))
    pool.to_send(2)
    pool.begin()
    pool.add(reply({0: a, 1: b}, torch.tensor([8 / 13, 5 / 13])), 13)
    pool.add(reply({1: c}, torch.tensor([0.0, 1.0])), 16)
    merged = pool.merged(by_count=True)
    everything = torch.cat([a, b, c]).double()
    torch.testing.assert_close(merged["0.running_mean"], everything.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged["0.running_var"], everything.var(0, correction=0), rtol=1e-5, atol=1e-6)
    held, of_one = pool.to_send(2), torch.cat([b, c]).double()
    torch.testing.assert_close(held[f"0.{MEAN}"][1].double(), of_one.mean(0), rtol=1e-6, atol=1e-6)
    assert held[f"0.{COUNT}"].tolist() == [8, 21]
    # A round in which nobody sees task 0: its moments stay, and its share.
    pool.begin()
    pool.add(reply({1: b}, torch.tensor([0.5, 0.5])), 5)
    pool.add(reply({1: b}, torch.tensor([0.5, 0.5])), 5)
    again = pool.merged(by_count=True)
    torch.testing.assert_close(again["0.running_mean"], (a.mean(0) + b.mean(0)).double() / 2, rtol=1e-6, atol=1e-6)
    gap = (a.mean(0) - b.mean(0)).double() / 2
    spread = (a.var(0, correction=0) + b.var(0, correction=0)).double() / 2 + gap**2
    torch.testing.assert_close(again["0.running_var"], spread, rtol=1e-5, atol=1e-6)


def test_clients_may_count_alike() -> None:
    a, b = torch.zeros(2, C), torch.full((8, C), 4.0)
    pool = pool_of(torch.nn.Sequential(layer("adab2n")))
    pool.to_send(2)
    for by_count, mean in ((True, 3.2), (False, 2.0)):
        pool.begin()
        pool.add(reply({0: a}, torch.tensor([1.0, 0.0])), 1)
        pool.add(reply({0: b}, torch.tensor([1.0, 0.0])), 1)
        assert pool.merged(by_count=by_count)["0.running_mean"].tolist() == pytest.approx([mean] * C)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_client_keeps_of_each_task(name: str) -> None:
    module = layer(name).double().train()
    kept = _Kept(
        torch.zeros(2, C, dtype=torch.float64), torch.ones(2, C, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.bool),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    mean, var = torch.zeros(2, C, dtype=torch.float64), torch.ones(2, C, dtype=torch.float64)
    for tasks in ([0, 0, 0, 1], [1, 1, 0, 1]):
        x = torch.randn(4, C, 2, 2, generator=generator, dtype=torch.float64) + 3
        module.set_tasks(torch.tensor(tasks), 2)
        module(x)
        kept.take(module, x, [1, 0])  # the client met experience 1 first
        for place, number in enumerate((1, 0)):
            rows = x[torch.tensor(tasks) == place].transpose(0, 1).flatten(1)
            mean[number] += module.eta * (rows.mean(1) - mean[number])
            var[number] += module.eta * (rows.var(1, correction=int(module.unbiased)) - var[number])
    torch.testing.assert_close(kept.mean, mean)
    torch.testing.assert_close(kept.var, var)
    assert kept.count.tolist() == [4, 4]
    shares = kept.shares(module, [1, 0])
    assert shares.sum() == pytest.approx(1)
    assert shares.tolist() == pytest.approx([0.5, 0.5])  # psi is zero, and so many of both
    if name == "adab2n":
        with torch.no_grad():
            module.task_weight[0] = 1.0
        first = (torch.e + 2) / (torch.e + 2 + 1 + 2)
        assert kept.shares(module, [1, 0]).tolist() == pytest.approx([1 - first, first])


@pytest.mark.parametrize("name", NAMES)
def test_of_one_task_a_client_keeps_the_running_moments(name: str) -> None:
    module = layer(name).double().train()
    turn = SimpleNamespace(
        extra={f"0.{MEAN}": torch.zeros(1, C), f"0.{VAR}": torch.zeros(1, C), f"0.{COUNT}": torch.zeros(1)},
        tensors={"mean": module.running_mean.clone(), "var": module.running_var.clone()},
    )
    kept = _Kept.begun(turn, "0", ("mean", "var"))  # type: ignore[arg-type]
    for seed in range(3):
        x = torch.randn(5, C, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        module.set_tasks(None, 1)
        module(x)
        kept.take(module, x, [])
    torch.testing.assert_close(kept.mean[0], module.running_mean)
    torch.testing.assert_close(kept.var[0], module.running_var)


GRID: dict[str, Any] = {
    "scenario": {"name": "split_digits", "num_experiences": 2, "train_per_experience": 32, "test_per_experience": 10},
    "model": {"width": 4},
    "learner": {"name": "er", "memory_size": 12},
    "train": {"batch_size": 8, "learning_rate": 0.05, "reset_optimizer": False},
}
BY_TASK = {"name": "fedavg", "moments": "pool_tasks"}


one_is_enough = pytest.mark.parametrize("norm", ["adab2n", pytest.param("task_balanced_norm", marks=pytest.mark.slow)])


def final(folder: Any, values: dict[str, Any]) -> dict[str, Tensor]:
    config = resolve(values)
    (learn if config.kind == "continual" else simulate)(config, runs=folder)
    return read_tensors(RunRecord(folder, config).folder / "model.safetensors", config.hash)[0]


@one_is_enough
def test_with_one_client_it_is_the_stream_bit_for_bit(tmp_path: Any, norm: str) -> None:
    train = {**GRID["train"], "epochs": 2}
    stream = final(tmp_path, {**GRID, "kind": "continual", "norm": {"name": norm}, "train": train})
    one = {"kind": "federated_continual", "grid": {"clients": 1}, "rounds": {"per_experience": 2}}
    grid = final(tmp_path, {**GRID, **one, "norm": {"name": norm}, "strategy": BY_TASK})
    assert all(torch.equal(tensor, grid[key]) for key, tensor in stream.items())


@one_is_enough
def test_with_one_task_it_is_fedavg_with_pooled_moments(tmp_path: Any, norm: str) -> None:
    values = {
        **GRID,
        "kind": "federated_continual",
        "scenario": {**GRID["scenario"], "num_experiences": 1},
        "learner": {"name": "naive"},
        "norm": {"name": norm},
        "grid": {"clients": 3, "partition": "dirichlet", "min_images": 4},
        "rounds": {"per_experience": 2},
    }
    by_task = final(tmp_path, {**values, "strategy": BY_TASK})
    pooled = final(tmp_path, {**values, "strategy": {"name": "fedavg", "moments": "pool"}})
    averaged = final(tmp_path, {**values, "strategy": {"name": "fedavg"}})
    for key, tensor in pooled.items():
        torch.testing.assert_close(by_task[key], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(averaged[k], t, rtol=1e-3) for k, t in pooled.items() if k.endswith("running_var"))


@pytest.mark.slow
def test_two_clients_on_two_tasks_go_on_to_the_same_bits(tmp_path: Any) -> None:
    values = {
        **GRID,
        "kind": "federated_continual",
        "norm": {"name": "adab2n"},
        "strategy": BY_TASK,
        "grid": {"clients": 2, "order": "rotated"},
        "rounds": {"per_experience": 2},
    }

    class Cut:
        def begin(self, bench: Any, first_round: int) -> None: ...

        def round(self, line: Any) -> None:
            if line["round"] == 3:
                raise KeyboardInterrupt

    whole = final(tmp_path / "whole", values)
    with pytest.raises(KeyboardInterrupt):
        simulate(resolve(values), runs=tmp_path / "cut", observer=Cut())
    again = final(tmp_path / "cut", values)
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    plain = final(tmp_path / "plain", {**values, "strategy": {"name": "fedavg", "moments": "pool"}})
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in whole.items())


@pytest.mark.parametrize(
    ("norm", "words"),
    [("batch_norm", r"counts no tasks: its counts cannot be merged\. Take norm adab2n"), ("group_norm", "has none")],
)
def test_a_norm_whose_counts_cannot_be_merged_is_refused_before_training(norm: str, words: str) -> None:
    values = {**GRID, "kind": "federated_continual", "norm": {"name": norm}, "strategy": BY_TASK}
    with pytest.raises(RoleError, match=words):
        workbench_of(resolve(values))


def test_a_checkpoint_of_another_network_is_refused() -> None:
    strategy = FedAvg(torch.nn.Sequential(layer("adab2n")), moments="pool_tasks")
    with pytest.raises(ConfigError, match="do not fit this network"):
        strategy.load_state_dict({"tasks/1.task_mean": torch.zeros(1, C)})
