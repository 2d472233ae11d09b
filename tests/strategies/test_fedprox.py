"""FedProx: the gradient that is added is that of mu/2 ||w - w_t||^2, and mu travels to the clients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from torch import nn

from fednorm.errors import ConfigError
from fednorm.federation.wire import pack
from fednorm.training.step import TrainingStep
from strategies.fedprox import ProximalTerm


@pytest.mark.parametrize("mu", [0.01, 2.5])
def test_the_added_gradient_is_autograds(mu: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    shared, local = [*model[0].parameters(), *model[2].parameters()], list(model[1].parameters())
    term = ProximalTerm(shared, mu)
    anchors = [p.detach().clone() for p in shared]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    penalty = mu / 2 * sum((p - a).square().sum() for p, a in zip(shared, anchors, strict=True))
    expected = torch.autograd.grad(penalty, shared)
    loss = torch.autograd.grad(model(torch.ones(2, 3).double()).square().sum(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), loss, strict=True):
        parameter.grad = gradient.clone()
    before = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    term()
    for parameter, gradient in zip(shared, expected, strict=True):
        torch.testing.assert_close(parameter.grad, before[id(parameter)] + gradient, rtol=1e-12, atol=1e-14)
    for parameter in local:
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[id(parameter)])


def test_the_term_is_in_force_from_the_second_step_and_pulls_back() -> None:
    model = nn.Linear(2, 2).double()
    anchor = model.weight.detach().clone()
    rate, mu = 0.1, 10.0  # rate * mu = 1: the pull alone would lead all the way back to the anchor
    step = TrainingStep(
        model, torch.optim.SGD(model.parameters(), lr=rate), adjust=[ProximalTerm(model.parameters(), mu)]
    )
    images, labels = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([1])
    for _ in range(2):
        gradient = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), model.weight)[0]
        step(images, labels)
        torch.testing.assert_close(model.weight, anchor - rate * gradient, rtol=1e-12, atol=1e-14)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    term = ProximalTerm([one, other], 1.0)
    term()
    assert one.grad is None
    one.grad = torch.zeros(2)
    one.data.add_(3)
    other.data.add_(3)
    term()
    assert one.grad.tolist() == [3, 3]
    assert other.grad is None


def test_mu_is_in_every_training_message_and_in_no_other(lab: Any) -> None:
    strategy = lab.make("fedprox", mu=0.25)
    update = lab.update(strategy, 0)
    grid = lab.answers(dict.fromkeys(range(2), (update, 1)))
    train = list(strategy.configure_train(3, pack(update), ConfigRecord({"mine": 1}), grid))
    evaluate = list(strategy.configure_evaluate(3, pack(update), ConfigRecord(), grid))
    assert [dict(m.content.config_records["config"]) for m in train] == [
        {"mine": 1, "proximal-mu": 0.25, "server-round": 3}
    ] * 2
    assert all("proximal-mu" not in m.content.config_records["config"] for m in evaluate)


def test_a_negative_mu_is_refused(lab: Any) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.mu.*got -0\.1"):
        lab.make("fedprox", mu=-0.1)
