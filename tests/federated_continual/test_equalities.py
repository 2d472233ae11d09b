"""A federation of one client is the stream, bit for bit; and a grid of two is 60 lines of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.config import resolve
from fednorm.federation.simulate import simulate as federate
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord
from fednorm.streams.simulate import simulate as learn

SMALL: dict[str, Any] = {
    "scenario": {"name": "split_digits", "train_per_experience": 24, "test_per_experience": 10},
    "model": {"width": 4},
    "train": {"batch_size": 8, "learning_rate": 0.05, "momentum": 0.5, "reset_optimizer": False},
}
MEMORY = {"memory_size": 12}
LEARNERS: dict[str, dict[str, Any]] = {
    "naive": {}, "er": MEMORY, "er_ace": MEMORY, "derpp": MEMORY, "ewc": {"fisher_samples": 6}, "lwf": {}
}  # fmt: skip


def run(tmp_path: Any, values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = resolve(values)
    result = (learn if config.kind == "continual" else federate)(config, runs=tmp_path)
    tensors, _ = read_tensors(RunRecord(tmp_path, config).folder / "model.safetensors", config.hash)
    return tensors, result


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
    rows = [[x for x in row[: i + 1]] for i, row in enumerate(one["accuracy_matrix"])]
    assert [[x for x in time[0] if x is not None] for time in other["accuracy_tensor"]] == rows
    for name in ("average_accuracy", "forgetting_max_minus_last", "forgetting_first_minus_last"):
        assert other["final"][name] == pytest.approx(one["final"][name], abs=1e-12)
    assert other["final"]["spatial_forgetting"] == 0
