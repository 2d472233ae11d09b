"""L2Init, against autograd of the term that the paper adds to the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.l2_init import L2Init
from fednorm.training.step import TrainingStep


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in [(3, 4), (5,), (), (2, 3, 2, 2)]
    ]


def move(ps: list[nn.Parameter], seed: int) -> None:
    with torch.no_grad():
        for p, q in zip(ps, parameters(seed), strict=False):
            p.add_(q)


def loss_of(ps: list[nn.Parameter]) -> Tensor:
    return sum((p.sin() * p).sum() for p in ps)  # type: ignore[return-value]


@pytest.mark.parametrize("strength", [0.3, 1e-4])
def test_it_adds_the_gradient_of_the_papers_term(strength: float) -> None:
    ps = parameters()
    initial = [p.detach().clone() for p in ps]
    effect = L2Init(ps, strength)
    move(ps, 1)
    term = sum(((p - p0) ** 2).sum() for p, p0 in zip(ps, initial, strict=True))
    expected = torch.autograd.grad(loss_of(ps) + strength * term, ps)
    loss_of(ps).backward()
    effect()
    for p, gradient in zip(ps, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)


def test_it_is_the_whole_gradient_where_the_loss_gives_none_and_frozen_parameters_have_none() -> None:
    used, unused, frozen = parameters()[:3]
    effect = L2Init([used, unused, frozen], 0.25)
    initial = unused.detach().clone()
    move([used, unused, frozen], 2)
    frozen.requires_grad_(False)
    used.square().sum().backward()
    effect()
    assert frozen.grad is None
    torch.testing.assert_close(unused.grad, 0.5 * (unused.detach() - initial), rtol=1e-12, atol=0)
    effect()
    torch.testing.assert_close(unused.grad, 1.0 * (unused.detach() - initial), rtol=1e-12, atol=0)


def test_without_a_loss_gradient_descent_goes_back_to_the_initial_values() -> None:
    ps = parameters()
    initial = [p.detach().clone() for p in ps]
    effect, optimizer = L2Init(ps, 0.1), torch.optim.SGD(ps, lr=0.5)
    move(ps, 3)
    away = [p.detach() - p0 for p, p0 in zip(ps, initial, strict=True)]
    for _ in range(4):
        optimizer.zero_grad()
        effect()
        optimizer.step()
    for p, p0, d in zip(ps, initial, away, strict=True):
        torch.testing.assert_close(p.detach(), p0 + (1 - 0.5 * 2 * 0.1) ** 4 * d, rtol=1e-12, atol=1e-14)


def test_a_resumed_run_needs_no_state_of_it() -> None:
    images = torch.randn(6, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 3

    def build() -> tuple[nn.Module, torch.optim.Optimizer, TrainingStep]:
        model = make_model("mlp", make_norm("batch_norm"), num_classes=3, image_size=4, width=5, seed=7)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, TrainingStep(model, optimizer, adjust=(L2Init(model.parameters(), 0.05),))

    model, optimizer, step = build()
    saved: list[Any] = []
    for i, batch in enumerate(images):
        if i == 3:
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        step(batch, labels)
    resumed, optimizer, step = build()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for batch in images[3:]:
        step(batch, labels)
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("strength", [0, -0.1, float("nan"), True, "much"])
def test_a_strength_that_is_none_is_refused(strength: Any) -> None:
    with pytest.raises(ConfigError, match=r"l2_init\.strength must be"):
        L2Init(parameters(), strength)
