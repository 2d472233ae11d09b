"""UPGD, against a loop over single weights that follows the official code, noise included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.cards import OPTIMIZERS
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.optimizers.upgd import UPGD
from fednorm.rng import torch_seeded


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(
    weights: list[list[float]],
    gradients: list[list[list[float]]],
    noise: list[list[list[float]]],
    *,
    lr: float,
    decay: float,
    beta: float,
    sigma: float,
) -> list[list[float]]:
    """One number after another: utilities of all tensors first, then their largest, then the moves."""
    weights = [list(tensor) for tensor in weights]
    utility = [[0.0] * len(tensor) for tensor in weights]
    for step, (grads, draws) in enumerate(zip(gradients, noise, strict=True), start=1):
        for tensor, grad, own in zip(weights, grads, utility, strict=True):
            for i, (w, g) in enumerate(zip(tensor, grad, strict=True)):
                own[i] = beta * own[i] - (1 - beta) * g * w
        largest = max(max(own) for own in utility)
        for tensor, grad, own, drew in zip(weights, grads, utility, draws, strict=True):
            for i, (g, z) in enumerate(zip(grad, drew, strict=True)):
                scaled = 1 / (1 + math.exp(-max(own[i] / (1 - beta**step) / largest, -700.0)))
                tensor[i] = tensor[i] * (1 - lr * decay) - lr * (g + sigma * z) * (1 - scaled)
    return weights


@pytest.mark.parametrize(
    ("beta", "sigma", "decay"), [(0.9, 0.3, 0.0), (0.0, 0.1, 0.1), (0.999, 0.0, 0.01), (0.5, 2.0, 0.0)]
)
def test_it_is_the_official_code_weight_by_weight(beta: float, sigma: float, decay: float) -> None:
    shapes = [(3, 4), (5,), (2, 1, 2, 2)]
    start = [drawn(*shape, seed=place) for place, shape in enumerate(shapes)]
    gradients = [[drawn(*shape, seed=10 * s + place) for place, shape in enumerate(shapes)] for s in range(1, 5)]
    with torch_seeded(3, "noise"):
        noise = [[torch.randn_like(each) for each in start] for _ in gradients]
    parameters = [nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = UPGD(parameters, lr=0.1, weight_decay=decay, beta_utility=beta, sigma=sigma)
    with torch_seeded(3, "noise"):
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    def flat(steps: list[list[Tensor]]) -> list[list[list[float]]]:
        return [[tensor.flatten().tolist() for tensor in tensors] for tensors in steps]

    expected = by_hand(flat([start])[0], flat(gradients), flat(noise), lr=0.1, decay=decay, beta=beta, sigma=sigma)
    for parameter, numbers in zip(parameters, expected, strict=True):
        wanted = torch.tensor(numbers, dtype=torch.float64).view_as(parameter)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-10, atol=1e-12)


def test_the_useful_are_held_and_the_harmful_move_on() -> None:
    """Without a weight the loss grows by -g w: the most useful one moves the least."""
    useful, harmful, idle = (nn.Parameter(torch.tensor([value])) for value in (1.0, -1.0, 0.0))
    for parameter in (useful, harmful, idle):
        parameter.grad = torch.tensor([-1.0])
    UPGD([useful, harmful, idle], lr=1.0, beta_utility=0.0, sigma=0.0).step()
    gate = 1 / (1 + math.exp(-1.0))
    for parameter, expected in ((useful, 1 + 1 - gate), (harmful, -1 + gate), (idle, 0.5)):
        assert float(parameter.detach()) == pytest.approx(expected, rel=1e-6)


def test_without_any_utility_it_is_half_of_gradient_descent() -> None:
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.ones(3)
    UPGD([zero], lr=0.2, sigma=0.0).step()
    assert zero.tolist() == pytest.approx([-0.1] * 3)


def test_what_has_no_gradient_stays_and_counts_for_nothing() -> None:
    trained, frozen = nn.Parameter(drawn(3)), nn.Parameter(drawn(3, seed=1))
    optimizer = UPGD([trained, frozen], lr=0.2, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(trained, drawn(3))
    trained.grad = drawn(3, seed=2)
    optimizer.step()
    assert torch.equal(frozen, drawn(3, seed=1))
    assert set(optimizer.state) == {trained}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0}, r"upgd\.lr must be greater than 0"),
        ({"lr": 0.1, "beta_utility": 1}, r"upgd\.beta_utility must be less than 1"),
        ({"lr": 0.1, "sigma": -1}, r"upgd\.sigma must be 0 or more; got -1"),
        ({"lr": 0.1, "weight_decay": "x"}, r"upgd\.weight_decay must be a finite number"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        UPGD([nn.Parameter(drawn(2))], **options)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"optimizer": "upgd", "momentum": 0.9}, "train.momentum is SGD's; upgd has none"),
        ({"optimizer": "sgd", "sigma": 0.1}, "train.sigma is an option of upgd, and optimizer sgd does without"),
        ({"optimizer": "upgd", "beta_utility": 1.0}, r"train.beta_utility must be in \[0, 1\); got 1"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused_in_words(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve({"train": train})
    assert set(OPTIMIZERS["upgd"].options) == {"beta_utility", "sigma"}
