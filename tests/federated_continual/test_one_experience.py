"""A stream of one experience is the plain federation, bit for bit; with a memory, that of its learners written out.

A plain federation deals its batches in other orders than a learner on a stream (both from named random streams, which
recorded runs rely on), so that its orders are taken for the comparison.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.config import resolve
from fednorm.federated_continual.turn import recall, remembered
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.federation.aggregation import Average
from fednorm.federation.flat import flattened
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.records.integrity import read_tensors
from fednorm.records.record import RunRecord

SMALL: dict[str, Any] = {"model": {"width": 4}, "train": {"batch_size": 8, "learning_rate": 0.05}}
GRID: dict[str, Any] = {
    **SMALL,
    "kind": "federated_continual",
    "scenario": {"name": "split_digits", "num_experiences": 1, "train_per_experience": 40, "test_per_experience": 20},
    "grid": {"clients": 2, "partition": "dirichlet", "min_images": 4},
    "rounds": {"per_experience": 2},
}
MEMORY = {"memory_size": 20}
LEARNERS: dict[str, dict[str, Any]] = {
    "naive": {}, "ewc": {"fisher_samples": 6}, "lwf": {},
    "er": MEMORY, "er_ace": MEMORY, "derpp": MEMORY, "gdumb": {**MEMORY, "memory_epochs": 5},
}  # fmt: skip
WITHOUT_MEMORY = ("naive", "ewc", "lwf")


def final(folder: Any, config: Any, bench: Any = None) -> dict[str, Tensor]:
    simulate(config, runs=folder, bench=bench)
    tensors, _ = read_tensors(RunRecord(folder, config).folder / "model.safetensors", config.hash)
    return tensors


def require_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert set(one) == set(two)
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items()), [
        key for key, tensor in one.items() if not torch.equal(tensor, two[key])
    ]


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))


@pytest.mark.cover(1)
@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedprox"])
@pytest.mark.parametrize("norm", ["batch_norm", "adab2n"])
@pytest.mark.parametrize("learner", WITHOUT_MEMORY)
def test_a_stream_of_one_experience_is_the_plain_federation(
    tmp_path: Any, learner: str, norm: str, strategy: str
) -> None:
    """What these learners add to a loss speaks of experiences before, of which there are none."""
    common = {"norm": {"name": norm}, "strategy": {"name": strategy}}
    config = resolve({**GRID, **common, "learner": {"name": learner, **LEARNERS[learner]}})
    grid = GridWorkbench(config)
    plain = resolve({**SMALL, **common, "kind": "federated", "rounds": {"num_rounds": 2}})
    federation = Workbench(plain, grid.federation)
    require_equal(final(tmp_path / "grid", config, grid), final(tmp_path / "plain", plain, federation))


def written_out(config: Any) -> dict[str, Tensor]:
    """Two learners that train in turn on what each holds, and the average of their tensors."""
    bench = GridWorkbench(config)
    server = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
    cells = [bench.grid.cells[client][0] for client in range(2)]
    memories: list[dict[str, Tensor]] = [{}, {}]
    for number in range(2):
        average = Average(bench.plan)
        for client, cell in enumerate(cells):
            assert cell is not None
            bench.model.load_state_dict(server)
            bench.trainee.begin_turn({})
            learner = bench.learner(client)
            recall(learner, memories[client])
            learner.train_passes(cell, 1)
            learner.train_part(cell, number, 2)
            memories[client] = remembered(learner)
            trained = {key: tensor.clone() for key, tensor in bench.model.state_dict().items()}
            average.add(trained, len(cell.train), flattened(trained))
        server = average.result()
    return server


@pytest.mark.cover(1)
@pytest.mark.parametrize("norm", ["batch_norm", "adab2n"])
@pytest.mark.parametrize(
    "learner", [name if name in ("derpp", "gdumb") else pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS]
)
def test_a_federation_of_learners_is_their_average(tmp_path: Any, learner: str, norm: str) -> None:
    config = resolve({**GRID, "norm": {"name": norm}, "learner": {"name": learner, **LEARNERS[learner]}})
    require_equal(final(tmp_path, config), written_out(config))
