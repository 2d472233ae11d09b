"""Who meets what when: every image once, orders, clients that come and go; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fednorm.config import GridConfig, resolve
from fednorm.errors import ConfigError, FedNormError
from fednorm.federated_continual import measures
from fednorm.federated_continual.cells import Grid, make_grid
from fednorm.federated_continual.measures import Course
from fednorm.federated_continual.workbench import GridWorkbench
from fednorm.streams.norm_boundary import NormBoundary
from fednorm.streams.stream import Stream


def stream(**options: Any) -> Stream:
    config = resolve({"kind": "continual", "scenario": {"name": "split_digits", **options}})
    made: Stream = config.scenario.card.stream(config.data, image_size=28, seed=1, options=config.scenario.options)
    return made


def rows_of(grid: Grid, number: int) -> list[int]:
    return sorted(
        row
        for client in range(len(grid.cells))
        for _, cell in grid.row(client)
        if cell.number == number
        for row in cell.train.index.tolist()
    )


@pytest.mark.parametrize("order", ["same", "rotated", "own"])
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_every_image_is_dealt_once(order: str, partition: str) -> None:
    whole = stream(train_per_experience=60)
    grid = make_grid(whole, GridConfig(clients=4, order=order, partition=partition, min_images=1), seed=3)
    for experience in whole:
        assert rows_of(grid, experience.number) == sorted(experience.train.index.tolist())
    again = make_grid(whole, GridConfig(clients=4, order=order, partition=partition, min_images=1), seed=3)
    assert [[c and c.train.index.tolist() for c in row] for row in grid.cells] == [
        [c and c.train.index.tolist() for c in row] for row in again.cells
    ]


def test_orders() -> None:
    whole = stream(train_per_experience=60)

    def numbers(order: str) -> list[list[int]]:
        grid = make_grid(whole, GridConfig(clients=3, order=order), seed=1)
        return [[cell.number for _, cell in grid.row(client)] for client in range(3)]

    assert numbers("same") == [[0, 1, 2, 3, 4]] * 3
    assert numbers("rotated") == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [2, 3, 4, 0, 1]]
    own = numbers("own")
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in own)
    assert len({tuple(row) for row in own}) > 1


def test_clients_come_and_go() -> None:
    grid = make_grid(stream(train_per_experience=60), GridConfig(clients=7, joining=1, leaving=1), seed=1)
    assert [[int(there) for there in row] for row in grid.present] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1],
    ]
    assert [[cell is not None for cell in row] for row in grid.cells] == [list(row) for row in grid.present]
    assert grid.course(3) == Course(((1, 1), (2, 2), (3, 3)), last=3)
    assert grid.scored(3, 4) == []
    assert grid.scored(3, 2) == [1, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grid": {"clients": 3, "joining": 1}}, r"No client is there at experience 1 of 5.*Raise grid\.clients"),
        ({"grid": {"clients": 3, "leaving": 1}}, r"No client is there at experience 4 of 5"),
        ({"grid": {"clients": 40, "min_images": 5}}, r"At time 1 of 5 no client has 5 training images"),
        ({"learner": {"name": "gdumb"}, "strategy": {"name": "scaffold"}}, r"gdumb trains a fresh network.*scaffold"),
        ({"learner": {"name": "gdumb"}, "strategy": {"name": "fedadam"}}, r"gdumb trains a fresh network.*fedadam"),
        ({"learner": {"name": "gdumb"}, "grid": {"norms": "freeze"}}, r"gdumb trains a fresh network.*Take 'keep'"),
        (
            {"learner": {"name": "er", "memory_size": 50, "memory_batch": 7}, "norm": {"name": "task_balanced_norm"}},
            r"task_balanced_norm puts the memory's samples beside parts of the new ones.*Set learner\.memory_batch",
        ),
        ({"grid": {"norms": "per_experience"}}, r"which\s+experience a test image is of is not known.*task_identity"),
        (
            {
                "grid": {"norms": "per_experience", "order": "rotated", "clients": 3},
                "evaluate": {"task_identity": True},
            },
            r"at time 1 clients are at the experiences 1, 2, 3, and strategy fedavg averages.*fedbn",
        ),
        (
            {
                "grid": {"norms": "per_experience", "order": "own"},
                "evaluate": {"task_identity": True},
                "strategy": {"name": "silobn"},
            },
            r"strategy silobn averages their normalization tensors",
        ),
        *(
            (
                {"grid": {"norms": what}, "norm": {"name": "sws"}, "evaluate": {"task_identity": True}},
                r"this network has none \(norm sws\): it would do nothing",
            )
            for what in ("reset", "freeze", "per_experience")
        ),
        ({"learner": {"name": "joint"}}, r"joint is given all experiences at once.*plain\s+federation"),
        ({"strategy": {"name": "fedrep"}}, r"fedrep trains in phases.*fedavg"),
        ({"strategy": {"name": "ditto"}}, r"Strategy ditto .* on its clients"),
        ({"strategy": {"name": "centralized"}}, r"It is\s+the stream itself"),
        ({"train": {"local_epochs": 0.5}}, r"whole passes over an experience; got train\.local_epochs = 0\.5"),
        (
            {"rounds": {"num_rounds": 3}},
            r"It is a key of federated runs\. A federated_continual run has rounds\.per_experience in its place",
        ),
        (
            {"train": {"epochs": 3}},
            r"It is a key of continual runs\. A federated_continual run has rounds\.per_experience",
        ),
        ({"train": {"norms": "reset"}}, r"It is a key of continual runs\. A federated_continual run has grid\.norms"),
        (
            {"strategy": {"name": "fedavg", "moments": "pool_tasks"}, "norm": {"name": "group_norm"}},
            r"FedAvg with moments='pool_tasks' acts on tensors of kind mean, var, and this DigitsCNN has none",
        ),
        ({"data": {"clients_per_domain": 2}}, r"data\.clients_per_domain says what clients hold"),
        *(
            (
                {"learner": {"name": name, "memory_size": 3}},
                r"capacity 3 cannot hold a sample of each of the 10 classes",
            )
            for name in ("er", "er_ace", "derpp", "gdumb")
        ),
        ({"evaluate": {"split": "validation"}}, r"no images of experience 0 were held back"),
    ],
)
def test_what_cannot_be_is_refused_before_training(values: dict[str, Any], words: str) -> None:
    base = {"kind": "federated_continual", "scenario": {"train_per_experience": 60}, "model": {"width": 4}}
    with pytest.raises(FedNormError, match=words):
        GridWorkbench(resolve({**base, **values}))


# The measures, by hand.


def test_accuracies_and_both_forgettings_by_hand() -> None:
    aggregated = [
        [[0.8, None], [None, 0.6]],
        [[0.5, 0.7], [0.9, 0.4]],
    ]
    own = [
        [[0.9, None], [None, 0.7]],
        [[0.5, 0.8], [0.9, 0.5]],
    ]
    courses = [Course(((0, 0), (1, 1)), 1), Course(((0, 1), (1, 0)), 1)]
    numbers = measures.final(aggregated, own, courses)
    assert numbers["average_accuracy"] == pytest.approx((0.6 + 0.65) / 2)
    assert numbers["worst_client"] == pytest.approx(0.6)
    assert numbers["forgetting_max_minus_last"] == pytest.approx((0.3 + 0.2) / 2)
    assert numbers["forgetting_first_minus_last"] == pytest.approx((0.3 + 0.2) / 2)
    assert numbers["average_incremental_accuracy"] == pytest.approx(((0.8 + 0.6) / 2 + (0.6 + 0.65) / 2) / 2)
    assert measures.spatial_forgetting(own[0], aggregated[0]) == pytest.approx(0.1)
    assert measures.spatial_forgetting(own[1], aggregated[1]) == pytest.approx((0 + 0.1 + 0 + 0.1) / 4)
    assert numbers["spatial_forgetting"] == pytest.approx((0.1 + 0.05) / 2)


def test_a_client_that_has_left_is_told_by_its_last_time() -> None:
    tensor = [[[0.8, None, None]], [[0.5, None, None]], [[None, None, None]]]
    matrix = measures.matrix_of(tensor, 0, Course(((0, 0),), last=1))
    assert matrix.tolist() == [[0.5]]
    assert np.isfinite(matrix).all()


# What the boundary does with norms.


def test_frozen_layers_stay_as_they_are_from_the_second_experience_on() -> None:
    config = resolve({"kind": "federated_continual", "scenario": {"train_per_experience": 60}, "model": {"width": 4}})
    model = GridWorkbench(config).model
    boundary, x = NormBoundary(model, "freeze"), torch.randn(8, 3, 28, 28)
    norms = {key: tensor.clone() for key, tensor in model.state_dict().items() if key in boundary.keys}
    assert {key.rpartition(".")[2] for key in norms} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    model.train()
    with boundary.frozen(1):
        boundary.rest(1)
        model(x).sum().backward()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in norms.items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert {key for key, p in model.named_parameters() if p.grad is None} == {
        key for key in norms if key.endswith(("weight", "bias"))
    }
    with boundary.frozen(0):
        boundary.rest(0)
        model(x)
    assert not all(torch.equal(model.state_dict()[key], tensor) for key, tensor in norms.items())
    back = NormBoundary(model, "reset")
    initial = {key: model.state_dict()[key].clone() for key in back.keys}
    model(x)
    back.begin(1)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in initial.items())


def test_a_grid_s_keys_are_of_no_other_run() -> None:
    with pytest.raises(ConfigError, match="It is a section of federated_continual runs"):
        resolve({"grid": {"clients": 2}})
