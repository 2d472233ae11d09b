"""A federation of one client is the stream, bit for bit; and a grid of two is 60 lines of plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fednorm.config import resolve
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.simulate import simulate as federate
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.rng import stream_seed, torch_stream
from fednorm.streams.simulate import simulate as learn

SMALL: dict[str, Any] = {
    "scenario": {"name": "split_digits", "train_per_experience": 24, "test_per_experience": 10},
    "model": {"width": 4},
    "train": {"batch_size": 8, "learning_rate": 0.05, "momentum": 0.5, "reset_optimizer": False},
}
MEMORY = {"memory_size": 12}
LEARNERS: dict[str, dict[str, Any]] = {
    "naive": {}, "er": MEMORY, "er_ace": MEMORY, "derpp": MEMORY, "ewc": {"fisher_samples": 6}, "lwf": {},
    "si": {}, "a_gem": MEMORY, "mir": MEMORY, "icarl": MEMORY, "scr": MEMORY,
    "gdumb": {**MEMORY, "memory_epochs": 5},
}  # fmt: skip


def run(tmp_path: Any, values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = resolve(values)
    result = (learn if config.kind == "continual" else federate)(config, runs=tmp_path)
    tensors, _ = read_tensors(RunRecord(tmp_path, config).folder / "model.safetensors", config.hash)
    return tensors, result


@pytest.mark.few(1)
@pytest.mark.parametrize("norm", ["batch_norm", "adab2n"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_federation_of_one_client_is_the_stream(tmp_path: Any, learner: str, norm: str) -> None:
    common = {**SMALL, "learner": {"name": learner, **LEARNERS[learner]}, "norm": {"name": norm}}
    stream, one = run(tmp_path, {"kind": "continual", **common, "train": {**SMALL["train"], "epochs": 2}})
    grid, other = run(
        tmp_path, {"kind": "federated_continual", **common, "grid": {"clients": 1}, "rounds": {"per_experience": 2}}
    )
    assert set(stream) == set(grid)
    for key, tensor in stream.items():
        assert torch.equal(tensor, grid[key]), key
    rows = [list(row[: i + 1]) for i, row in enumerate(one["accuracy_matrix"])]
    assert [[x for x in time[0] if x is not None] for time in other["accuracy_tensor"]] == rows
    for name in ("average_accuracy", "forgetting_max_minus_last", "forgetting_first_minus_last"):
        assert other["final"][name] == pytest.approx(one["final"][name], abs=1e-12)
    if learner != "icarl":  # which has exemplars of an experience's classes only when it has ended, after the averaging
        assert other["final"]["spatial_forgetting"] == 0


GRID: dict[str, Any] = {
    "kind": "federated_continual",
    "scenario": {"name": "split_digits", "num_experiences": 2, "train_per_experience": 40, "test_per_experience": 20},
    "model": {"width": 4},
    "learner": {"name": "er", "memory_size": 10},
    "norm": {"name": "batch_norm"},
    "grid": {"clients": 2},
    "rounds": {"per_experience": 2},
    "train": {"batch_size": 8, "learning_rate": 0.05},
}


class Reservoir:
    """Algorithm R, a sample at a time, with a run's own random streams."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.held: list[tuple[Tensor, Tensor]] = []
        self.capacity, self.offered = capacity, 0
        self.entering, self.drawing = torch_stream(seed, "buffer", "insert"), torch_stream(seed, "buffer", "draw")

    def with_drawn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self.held:
            return images, labels
        drawn = torch.randperm(len(self.held), generator=self.drawing)[: len(labels)].tolist()
        old = [torch.stack(part) for part in zip(*(self.held[i] for i in drawn), strict=True)]
        return torch.cat([images, old[0]]), torch.cat([labels, old[1]])

    def offer(self, images: Tensor, labels: Tensor) -> None:
        late = max(len(labels) - max(self.capacity - self.offered, 0), 0)
        uniform = torch.rand(late, dtype=torch.float64, generator=self.entering).tolist() if late else []
        for sample in zip(images, labels, strict=True):
            self.offered += 1
            slot = self.offered - 1 if self.offered <= self.capacity else int(uniform.pop(0) * self.offered)
            if slot < self.capacity:
                self.held[slot : slot + 1] = [sample]


def written_out(config: Any) -> dict[str, Tensor]:
    """Two clients, two experiences, experience replay, FedAvg: plain PyTorch."""
    bench = GridWorkbench(config)
    model, server = bench.model, {k: t.clone() for k, t in bench.model.state_dict().items()}
    seeds = [config.seed, stream_seed(config.seed, "client", 1)]
    memories = [Reservoir(config.learner.options["memory_size"], seed) for seed in seeds]

    def train(split: Any, order: Tensor, memory: Reservoir) -> dict[str, Tensor]:
        model.load_state_dict(server)
        model.train()
        for rows in torch.split(order, config.train.batch_size):
            images, labels = split.images[split.index[rows]], split.labels[split.index[rows]]
            x, y = memory.with_drawn(images, labels)
            model.zero_grad()
            functional.cross_entropy(model(x.float() / 127.5 - 1), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= config.train.learning_rate * parameter.grad
            memory.offer(images, labels)
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    for time, number in itertools.product(range(2), range(2)):
        splits = [bench.grid.cells[client][time].train for client in range(2)]  # type: ignore[union-attr]
        names = ("experience", time, "epoch", number, "order")
        orders = [torch.randperm(len(splits[k]), generator=torch_stream(seeds[k], *names)) for k in range(2)]
        one, two = (train(splits[k], orders[k], memories[k]) for k in range(2))
        n, m = map(len, splits)
        server = {k: (n * one[k] + m * two[k]) / (n + m) if one[k].is_floating_point() else one[k] for k in one}
    return server


def test_a_grid_of_two_is_what_plain_pytorch_makes_of_it(tmp_path: Any) -> None:
    tensors, _ = run(tmp_path, GRID)
    expected = written_out(resolve(GRID))
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedbn", "scaffold", "fedprox"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path: Any, strategy: str) -> None:
    """In the middle of an experience, and just before its boundary."""
    values = {**GRID, "strategy": {"name": strategy}, "learner": {"name": "derpp", "memory_size": 12}}
    whole, result = run(tmp_path / "whole", values)

    class Cut:
        def __init__(self, after: int) -> None:
            self.after = after

        def begin(self, bench: Any, first_round: int) -> None: ...

        def round(self, line: Any) -> None:
            if line["round"] == self.after:
                raise KeyboardInterrupt

    config = resolve(values)
    for after in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            federate(config, runs=tmp_path / "cut", observer=Cut(after))
    tensors, again = run(tmp_path / "cut", values)
    for key, tensor in whole.items():
        assert torch.equal(tensor, tensors[key]), key
    assert again["accuracy_tensor"] == result["accuracy_tensor"]
    assert again["own_accuracy_tensor"] == result["own_accuracy_tensor"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedbn", "scaffold"])
def test_workers_give_the_bits_of_one_client_after_the_other(tmp_path: Any, strategy: str) -> None:
    values = {**GRID, "strategy": {"name": strategy}, "learner": {"name": "derpp", "memory_size": 12}}
    one, first = run(tmp_path / "1", {**values, "workers": 1})
    two, second = run(tmp_path / "2", {**values, "workers": 2})
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert first["accuracy_tensor"] == second["accuracy_tensor"]
