"""SGDP and AdamP: the update loses what only lengthens a weight; formulas, options, memory layouts, state."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.cards import OPTIMIZERS
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.optimizers.adamp import AdamP
from fednorm.optimizers.sgdp import SGDP

KINDS: Mapping[str, type[torch.optim.Optimizer]] = {"sgdp": SGDP, "adamp": AdamP}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(kind: str, weight: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = KINDS[kind]([parameter], **options)  # type: ignore[call-arg]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def orthogonal(gradient: Tensor, weight: Tensor, *, rows: bool) -> Tensor:
    """Return the gradient without its part along the weight, as that of a scale-invariant weight has none."""
    flat, w = (t.flatten(1) if rows else t.reshape(1, -1) for t in (gradient, weight))
    return (flat - w * (flat * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True)).reshape(weight.shape)


@pytest.mark.parametrize("rows", [True, False], ids=["channels", "layer"])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 6)])
def test_sgdp_is_its_formula(shape: tuple[int, ...], rows: bool) -> None:
    weight, lr, decay, momentum = drawn(*shape), 0.1, 0.01, 0.9
    buffer, w = torch.zeros_like(weight), weight.clone()
    gradients = []
    for number in range(3):
        gradients.append(gradient := orthogonal(drawn(*shape, seed=number + 1), w, rows=rows))
        buffer = momentum * buffer + gradient
        update = gradient + momentum * buffer
        update = orthogonal(update, w, rows=rows)
        w = w * (1 - lr * decay * 0.1 / (1 - momentum)) - lr * update
    ours = step("sgdp", weight, gradients, lr=lr, weight_decay=decay, momentum=momentum, nesterov=True)
    torch.testing.assert_close(ours, w, rtol=1e-7, atol=1e-9)  # the official eps of 1e-8 beside a norm


@pytest.mark.parametrize("rows", [True, False], ids=["channels", "layer"])
def test_adamp_is_its_formula(rows: bool) -> None:
    weight, lr, decay = drawn(4, 3, 3, 3), 0.01, 0.1
    first, second, w = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    gradients = []
    for number in range(1, 4):
        gradients.append(gradient := orthogonal(drawn(4, 3, 3, 3, seed=number), w, rows=rows))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        update = orthogonal(update, w, rows=rows)
        w = w * (1 - lr * decay * 0.1) - lr / (1 - 0.9**number) * update
    torch.testing.assert_close(step("adamp", weight, gradients, lr=lr, weight_decay=decay), w, rtol=1e-7, atol=1e-9)


def test_a_gradient_along_the_weight_is_that_of_adamw_and_of_sgd() -> None:
    """Where the test fails nothing is taken out, and what is left is decoupled decay with the plain update."""
    weight = drawn(4, 3)
    gradients = [weight + 0.1 * drawn(4, 3, seed=seed) for seed in range(3)]
    theirs = nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    plain = nn.Parameter(weight.clone())
    sgd = torch.optim.SGD([plain], lr=0.01, momentum=0.9)
    for gradient in gradients:
        theirs.grad, plain.grad = gradient.clone(), gradient.clone()
        adamw.step()
        sgd.step()
    ours = step("adamp", weight, gradients, lr=0.01, weight_decay=0.1)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)
    ours = step("sgdp", weight, gradients, lr=0.01, momentum=0.9)
    torch.testing.assert_close(ours, plain.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_never_projected_and_delta_0_never_projects(kind: str) -> None:
    vector = drawn(6)
    gradient = [orthogonal(drawn(1, 6, seed=2), vector.view(1, -1), rows=True).view(-1)] * 4
    torch.testing.assert_close(step(kind, vector, gradient, lr=0.1), step(kind, vector, gradient, lr=0.1, delta=0.0))
    matrix = drawn(3, 6)
    gradients = [orthogonal(drawn(3, 6, seed=seed), matrix, rows=True) for seed in (3, 4)]
    options = {"lr": 0.1, **({"momentum": 0.9} if kind == "sgdp" else {})}
    projected, never = (step(kind, matrix, gradients, **options, delta=delta) for delta in (0.1, 0.0))
    assert not torch.allclose(projected, never)


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_does_not_lengthen_a_weight_before_a_normalization(kind: str) -> None:
    """||w'||^2 = ||w||^2 + ||step||^2 where the step is orthogonal; momentum's own part along the weight adds more."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(8, 16, bias=False), nn.LayerNorm(16, elementwise_affine=False)).double()]
    nets.append(copy.deepcopy(nets[0]))
    options: dict[str, Any] = {"lr": 0.05, **({"momentum": 0.9} if kind == "sgdp" else {})}
    target = drawn(32, 16)
    lengths = []
    for net, delta in zip(nets, (0.1, 0.0), strict=True):
        optimizer = KINDS[kind](net.parameters(), **options, delta=delta)  # type: ignore[call-arg]
        for _ in range(60):
            optimizer.zero_grad()
            (net(drawn(32, 8)) - target).square().mean().backward()
            optimizer.step()
        lengths.append(float(net[0].weight.detach().norm()))
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_layout_of_a_restored_state_changes_no_bit(kind: str) -> None:
    """A checkpoint keeps values and no layout; the parameters are in channels_last."""
    weight = drawn(8, 6, 3, 3).float().to(memory_format=torch.channels_last)
    gradients = [drawn(8, 6, 3, 3, seed=seed).float().to(memory_format=torch.channels_last) for seed in (1, 2, 3)]
    whole, cut = (nn.Parameter(weight.clone()) for _ in range(2))
    options = {"lr": 0.1, "delta": 9.0, **({"momentum": 0.9} if kind == "sgdp" else {})}
    first, second, third = (KINDS[kind]([p], **options) for p in (whole, cut, cut))  # type: ignore[arg-type]

    def go(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, numbers: range) -> None:
        for number in numbers:
            parameter.grad = gradients[number].clone()
            optimizer.step()

    go(first, whole, range(3))
    go(second, cut, range(2))
    saved = second.state_dict()
    for state in saved["state"].values():
        state.update({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()})
    third.load_state_dict(saved)
    go(third, cut, range(2, 3))
    assert torch.equal(whole, cut)
    assert whole.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_0_on_the_way_moves_nothing(kind: str) -> None:
    """A schedule may fall to 0; only a run that begins there is refused."""
    parameter = nn.Parameter(drawn(3, 4))
    before = parameter.detach().clone()
    optimizer = KINDS[kind]([parameter], lr=0.1, weight_decay=0.1)  # type: ignore[call-arg]
    optimizer.param_groups[0]["lr"] = 0.0
    parameter.grad = drawn(3, 4, seed=1)
    optimizer.step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("adamp", {"lr": 0}, r"adamp\.lr must be greater than 0; got 0"),
        ("adamp", {"lr": math.nan}, r"adamp\.lr must be a finite number"),
        ("adamp", {"lr": 0.1, "betas": (0.9, 1)}, r"adamp\.betas must be less than 1"),
        ("adamp", {"lr": 0.1, "betas": (-0.9, 0.9)}, r"adamp\.betas must be 0 or more; got -0\.9"),
        ("adamp", {"lr": 0.1, "eps": 0}, r"adamp\.eps must be greater than 0; got 0"),
        ("adamp", {"lr": 0.1, "nesterov": 1}, r"adamp\.nesterov must be true or false; got 1"),
        ("sgdp", {"lr": -1}, r"sgdp\.lr must be greater than 0; got -1"),
        ("sgdp", {"lr": 0.1, "momentum": 1.0}, r"sgdp\.momentum must be less than 1"),
        ("sgdp", {"lr": 0.1, "dampening": 2}, r"sgdp\.dampening must be at most 1; got 2"),
        ("sgdp", {"lr": 0.1, "delta": -0.1}, r"sgdp\.delta must be 0 or more; got -0\.1"),
        ("sgdp", {"lr": 0.1, "wd_ratio": 1.5}, r"sgdp\.wd_ratio must be at most 1; got 1\.5"),
        ("sgdp", {"lr": 0.1, "weight_decay": "much"}, r"sgdp\.weight_decay must be a finite number; got 'much'"),
    ],
)
def test_bad_options_are_refused_in_words(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KINDS[kind]([nn.Parameter(drawn(2, 2))], **options)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"optimizer": "adamp", "learning_rate": 0}, "train.learning_rate must be greater than 0; got 0"),
        ({"optimizer": "adamp", "momentum": 0.9}, "train.momentum is SGD's; adamp has betas of its own"),
        ({"optimizer": "sgdp", "wd_ratio": 1.5}, r"train.wd_ratio must be in \[0, 1\]; got 1.5"),
        ({"optimizer": "sgdp", "delta": -1.0}, "train.delta must be 0 or more; got -1"),
        (
            {"optimizer": "adam", "delta": 0.2},
            "train.delta is an option of adamp, sgdp, and optimizer adam does without",
        ),
        ({"nesterov": True, "optimizer": "adamw"}, "train.nesterov is an option of adamp, sgd, sgdp"),
        ({"optimizer": "sgdp", "nesterov": True}, "train.nesterov looks ahead along the momentum, and train.momentum"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused_in_words(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve({"train": train})


def test_options_reach_the_optimizers_that_have_them() -> None:
    train = resolve({"train": {"optimizer": "sgdp", "momentum": 0.9, "nesterov": True, "delta": 0.3}}).train
    assert train.of_optimizer() == {"nesterov": True, "delta": 0.3}
    made = OPTIMIZERS["sgdp"].make([nn.Parameter(drawn(2))], lr=0.1, momentum=0.9, weight_decay=0.0, delta=0.3)
    assert (made.defaults["delta"], made.defaults["wd_ratio"]) == (0.3, 0.1)
    nesterov = OPTIMIZERS["sgd"].make([nn.Parameter(drawn(2))], lr=0.1, momentum=0.9, weight_decay=0, nesterov=True)
    assert nesterov.defaults["nesterov"]
    assert set(OPTIMIZERS["adamp"].options) == {"nesterov", "wd_ratio", "delta"}
    assert OPTIMIZERS["adam"].options == {}
