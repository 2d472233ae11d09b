"""The training step and the layers that take part in it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fednorm
from fednorm.errors import DataError
from fednorm.norms import make_norm
from fednorm.spec import HookedLayer
from fednorm.training.step import TrainingStep


class Listening(HookedLayer, nn.Module):
    """Writes down what it is told, and asks for the square of its parameter."""

    def __init__(self, calls: list[Any], factor: float) -> None:
        super().__init__()
        self.calls, self.factor = calls, factor
        self.weight = nn.Parameter(torch.tensor(2.0))

    def set_tasks(self, tasks: Tensor | None, num_tasks: int) -> None:
        self.calls.append(("tasks", None if tasks is None else tasks.tolist(), num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("forward")
        return x

    def penalty(self) -> Tensor | None:
        self.calls.append("penalty")
        return self.factor * self.weight**2 if self.factor else None

    def end_experience(self) -> None:
        self.calls.append("end")


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 4, 4, generator=draw), torch.arange(n) % 2


def network(norm: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layer = make_norm(norm, options).layer(4, 2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def step_of(model: nn.Module) -> TrainingStep:
    return TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.5))


def test_hooks_are_called_in_order_and_penalties_reach_the_parameters_and_not_the_reported_loss() -> None:
    calls: list[Any] = []
    first, second = Listening(calls, 0.0), Listening(calls, 0.25)
    step = step_of(nn.Sequential(first, second, nn.Flatten(), nn.Linear(48, 2)))
    images, labels = batch()
    loss, logits = step(images, labels, tasks=torch.tensor([0, 1, 1, 2]), num_tasks=3)
    told = ("tasks", [0, 1, 1, 2], 3)
    assert calls == [told, told, "forward", "forward", "penalty", "penalty"]
    assert torch.equal(loss, functional.cross_entropy(logits, labels))
    assert (first.weight.item(), second.weight.item()) == (2.0, 2.0 - 0.5 * 0.25 * 2 * 2)
    step(images, labels)
    assert calls[6:8] == [("tasks", None, 1)] * 2
    step.end_experience()
    assert calls[-2:] == ["end", "end"]


def test_models_without_hooks_compute_what_they_did_and_do_not_look_at_tasks() -> None:
    ours, plain = network("batch_norm"), network("batch_norm")
    step, optimizer = step_of(ours), torch.optim.SGD(plain.parameters(), lr=0.5)
    assert step.hooked == ()
    images, labels = batch()
    for _ in range(3):
        loss, logits = step(images, labels, tasks=torch.tensor([9]), num_tasks=1)
        optimizer.zero_grad(set_to_none=True)
        expected = plain(images)
        wanted = functional.cross_entropy(expected, labels)
        wanted.backward()
        optimizer.step()
        assert torch.equal(loss, wanted)
        assert torch.equal(logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))


def test_a_step_with_adab2n_follows_the_gradient_of_both_losses() -> None:
    model = network("adab2n", num_tasks=3, lambd=0.5)
    twin = copy.deepcopy(model)
    images, labels = batch()
    tasks = torch.tensor([0, 1, 1, 1])
    step_of(model)(images, labels, tasks=tasks, num_tasks=3)
    layer = twin[1]
    layer.set_tasks(tasks, 3)  # type: ignore[operator]
    loss = functional.cross_entropy(twin(images), labels)
    grads = torch.autograd.grad(loss + layer.penalty(), list(twin.parameters()))  # type: ignore[operator]
    for trained, parameter, grad in zip(model.parameters(), twin.parameters(), grads, strict=True):
        torch.testing.assert_close(trained, parameter - 0.5 * grad)
    assert model[1].task_weight.abs().min() > 0  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("tasks", "num_tasks", "words"),
    [
        ([0, 1], 2, r"4 images; got shape \(2,\)"),
        ([0, 1, 2, 0], 2, "0 to 1, for 2 tasks seen so far; got 0 to 2"),
        ([0, -1, 0, 0], 2, "got -1 to 0"),
    ],
)
def test_tasks_that_do_not_fit_are_refused_before_anything_changes(
    tasks: list[int], num_tasks: int, words: str
) -> None:
    model = network("adab2n")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=words):
        step_of(model)(*batch(), tasks=torch.tensor(tasks), num_tasks=num_tasks)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_run_says_nothing_of_tasks_that_its_learner_tells() -> None:
    """The look at a network's size before a run is no training pass that was never told its tasks."""
    config = {"model": {"width": 4}, "scenario": {"train_per_experience": 10}, "train": {"batch_size": 10}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fednorm.continual(scenario="split_digits", learner="naive", norm="adab2n", online=True, config=config)
    assert not [warning for warning in said if "never told" in str(warning.message)]
