"""Batch-channel normalization written out, by the batch and by estimates, and what strategies do with its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import STRATEGIES
from fednorm.conversion import convert
from fednorm.errors import DataError
from fednorm.norms import make_norm
from fednorm.norms.batch_channel_norm import BatchChannelNormLayer
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.roles import Role
from fednorm.training.recalibration import reestimate


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(**options: Any) -> BatchChannelNormLayer:
    layer = make_norm("batch_channel_norm", {"num_groups": 3, **options}).layer(6, 2).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data += 0.3 * gaussian(*parameter.shape, seed=90 + seed)
    assert isinstance(layer, BatchChannelNormLayer)
    return layer


def second(u: Tensor, layer: BatchChannelNormLayer) -> Tensor:
    """Return the second half, sample by sample and group by group."""
    y = torch.empty_like(u)
    for n in range(len(u)):
        for g in range(3):
            part = u[n, 2 * g : 2 * g + 2]
            centred = part - part.mean()
            scaled = centred / ((centred**2).mean() + 1e-5).sqrt()
            y[n, 2 * g : 2 * g + 2] = scaled * layer.group_weight[g] + layer.group_bias[g]
    return y


def first(x: Tensor, mean: Tensor, var: Tensor, layer: BatchChannelNormLayer) -> Tensor:
    wide = (1, 6, 1, 1)
    scaled = (x - mean.view(wide)) / (var.view(wide) + 1e-5).sqrt()
    return scaled * layer.weight.view(wide) + layer.bias.view(wide)


def test_estimates_move_around_the_mean_of_before_and_normalize_at_once() -> None:
    layer = made(statistics="estimate", moving_speed=0.3)
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for number in range(4):
        x = (1 + number) * gaussian(2, 6, 3, 3, seed=number) + number
        around = ((x - mean.view(1, 6, 1, 1)) ** 2).mean((0, 2, 3))
        mean, var = 0.7 * mean + 0.3 * x.mean((0, 2, 3)), 0.7 * var + 0.3 * around
        torch.testing.assert_close(layer(x), second(first(x, mean, var, layer), layer), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-14)
    x = gaussian(1, 6, 3, 3, seed=20)
    torch.testing.assert_close(layer.eval()(x), second(first(x, mean, var, layer), layer), rtol=1e-11, atol=1e-12)


def test_estimates_are_constants_for_the_gradient() -> None:
    layer = made(statistics="estimate", moving_speed=0.3)
    layer(gaussian(4, 6, 3, 3))
    x, gy = gaussian(4, 6, 3, 3, seed=1), gaussian(4, 6, 3, 3, seed=2)
    ours = x.clone().requires_grad_()
    layer(ours).backward(gy)
    written = x.clone().requires_grad_()
    second(first(written, layer.running_mean, layer.running_var, layer), layer).backward(gy)
    torch.testing.assert_close(ours.grad, written.grad, rtol=1e-10, atol=1e-12)


def test_by_the_batch_it_is_batch_norm_with_its_running_moments_then_groups() -> None:
    layer, batch_norm = made(momentum=0.3), nn.BatchNorm2d(6, momentum=0.3).double()
    batch_norm.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("group")})
    for number in range(3):
        x = gaussian(3, 6, 2, 4, seed=number)
        torch.testing.assert_close(layer(x), second(batch_norm(x), layer), rtol=1e-11, atol=1e-12)
    assert torch.equal(layer.running_var, batch_norm.running_var)  # unbiased, as PyTorch's
    assert int(layer.num_batches_tracked) == 3
    x = gaussian(1, 6, 2, 4, seed=9)
    torch.testing.assert_close(layer.eval()(x), second(batch_norm.eval()(x), layer), rtol=1e-11, atol=1e-12)


def test_weights_are_standardized_unless_told_otherwise() -> None:
    norm = make_norm("batch_channel_norm")
    conv = norm.conv(4, 6, 3).double()
    assert isinstance(conv, WSConv2d)
    x, kernels = gaussian(2, 4, 5, 5), []
    for kernel in conv.weight:
        centred = kernel - kernel.mean()
        kernels.append(centred / ((centred**2).sum() / (4 * 9 - 1) + 1e-5).sqrt())
    torch.testing.assert_close(conv(x), functional.conv2d(x, torch.stack(kernels), conv.bias))
    assert type(make_norm("batch_channel_norm", {"weight_standardization": False}).conv(4, 6, 3)) is nn.Conv2d
    converted = convert(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), norm)
    assert isinstance(converted[0], WSConv2d)  # type: ignore[index]


@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_statistics_estimated_anew_are_each_batch_s_own(statistics: str) -> None:
    """Also of estimates, whose variance around a mean of 0 would be none."""
    layer = made(statistics=statistics)
    parts = [gaussian(n, 6, 3, 3, seed=n) + 50 for n in (4, 7)]
    reestimate(layer, parts)
    torch.testing.assert_close(layer.running_mean, sum(part.mean((0, 2, 3)) for part in parts) / 2)
    torch.testing.assert_close(layer.running_var, sum(part.var((0, 2, 3)) for part in parts) / 2)


def test_a_group_that_is_one_number_is_refused() -> None:
    layer = make_norm("batch_channel_norm", {"num_groups": 6}).layer(6, 2)
    assert layer(torch.randn(3, 6, 2, 2)).shape == (3, 6, 2, 2)
    with pytest.raises(DataError, match=r"6 groups of 6 channels meets .*\(3, 6, 1, 1\).*Set num_groups lower"):
        layer(torch.randn(3, 6, 1, 1))
    with pytest.raises(DataError, match="more than one value per channel"):
        made()(gaussian(1, 6))


@pytest.mark.parametrize("name", ["fedavg", "fedbn", "silobn"])
def test_the_groups_map_is_averaged_by_every_strategy(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), make_norm("batch_channel_norm").layer(6, 2), nn.Conv2d(6, 2, 1))
    plan = STRATEGIES[name].made(model, {}).plan
    roles = {key.removeprefix("1."): entry.role for key, entry in plan.by_key.items() if key.startswith("1.")}
    batch, moments = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
    local = {"fedavg": (), "fedbn": (*batch, *moments), "silobn": moments}[name]
    assert {key for key, role in roles.items() if role is Role.LOCAL} == set(local)
    assert roles["group_weight"] is roles["group_bias"] is Role.SHARED
