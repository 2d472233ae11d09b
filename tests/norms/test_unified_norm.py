"""Unified normalization written out step by step, its filter of outliers, and the window before it is full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.errors import DataError
from fednorm.federation.plan import norm_plan
from fednorm.norms import make_norm
from fednorm.norms.unified_norm import UnifiedNormLayer
from fednorm.roles import Carry, Role, RoleRule
from fednorm.training.recalibration import reestimate

WIDE = (1, 5, 1, 1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(channels: int = 5, **options: Any) -> UnifiedNormLayer:
    layer = make_norm("unified_norm", options).layer(channels, 2).double()
    layer.weight.data += 0.3 * gaussian(channels, seed=90)
    layer.bias.data += gaussian(channels, seed=91)
    assert isinstance(layer, UnifiedNormLayer)
    return layer


def trained(layer: UnifiedNormLayer, x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


class WrittenOut:
    """The formulas, with lists of the last batches in place of ring buffers; no filter."""

    def __init__(self, window: int, backward: int, warmup: int) -> None:
        self.sizes, self.warmup, self.t = (window, backward), warmup, 0
        self.squares: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.running, self.ema = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)

    def step(self, x: Tensor, gy: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.t += 1
        t, (window, backward) = self.t, self.sizes
        q = (x**2).mean((0, 2, 3))
        self.squares = [*self.squares, q][-window:]
        early = t < self.warmup
        var = q if early or t <= window else math.prod(self.squares) ** (1 / window)
        ratio = torch.ones(5) if t <= max(1000, self.warmup) else ((var + 1e-5) / (self.running + 1e-5)).sqrt()
        ratio = ratio.clamp(1 / 5, 5)
        z = x / (var + 1e-5).sqrt().view(WIDE)
        self.running = 0.9 * self.running + 0.1 * var
        g = gy * (weight * ratio).view(WIDE)
        gz = (g * z).mean((0, 2, 3))
        self.gradients = [*self.gradients, gz][-backward:]
        mean = gz if early or t <= backward else sum(self.gradients) / backward
        self.ema = 0.9 * self.ema + 0.1 * mean
        dx = (g - self.ema.view(WIDE) * z) / (var + 1e-5).sqrt().view(WIDE)
        return z * weight.view(WIDE) + bias.view(WIDE), dx, (gy * z).sum((0, 2, 3)) * ratio, gy.sum((0, 2, 3))


@pytest.mark.parametrize(("window", "backward", "warmup"), [(2, 2, 0), (3, 4, 5), (4, 2, 1)])
@pytest.mark.parametrize("start", [0, 1008])
def test_every_step_is_that_of_the_formulas(window: int, backward: int, warmup: int, start: int) -> None:
    layer = made(window=window, backward_window=backward, warmup_iters=warmup, outlier_filtration=False)
    right = WrittenOut(window, backward, warmup)
    for number in range(10):
        if number == 6 and start:
            layer.iters.fill_(start)  # r is 1 for the first thousand batches
            right.t = start
            assert start % window == start % backward == 0
            layer.buffer_x2.copy_(torch.stack([right.squares[-window:][i - 1] for i in range(window)]))
            layer.buffer_gz.copy_(torch.stack([right.gradients[-backward:][i - 1] for i in range(backward)]))
        x, gy = (1 + number % 3) * gaussian(3, 5, 2, 4, seed=number), gaussian(3, 5, 2, 4, seed=30 + number)
        wanted = right.step(x, gy, layer.weight.detach(), layer.bias.detach())
        for ours, value in zip(trained(layer, x, gy), wanted, strict=True):
            torch.testing.assert_close(ours, value.double(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(layer.running_var, right.running, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.ema_gz, right.ema, rtol=1e-10, atol=1e-13)
    x = gaussian(3, 5, 2, 4, seed=50)
    y = x / (right.running.view(WIDE) + 1e-5).sqrt() * layer.weight.view(WIDE) + layer.bias.view(WIDE)
    torch.testing.assert_close(layer.eval()(x), y, rtol=1e-12, atol=1e-12)


def test_a_window_of_one_has_the_true_gradient_and_a_longer_one_has_not() -> None:
    x = gaussian(3, 5, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(made(window=1), (x,))
    assert not torch.autograd.gradcheck(made(window=2), (x,), raise_exception=False)
    assert torch.autograd.gradcheck(made(window=2).eval(), (x,))


def test_an_outlier_is_normalized_by_itself_and_the_window_forgets_it() -> None:
    layer, blind = (made(window=3, warmup_iters=4, outlier_filtration=on) for on in (True, False))
    base = gaussian(8, 5, 4, 4)
    base = base / (base**2).mean((0, 2, 3), keepdim=True).sqrt()
    # Arithmetic less geometric mean of (1, 1.44, 0.64): 0.053; 3 times the variance of the roots, 15 of them: 0.086.
    batches = [size * base for size in (1, 1.2, 0.8) * 2]
    for batch in batches:
        layer(batch)
        blind(batch)
    assert int(layer.skip_counter) == 0
    assert torch.equal(layer.buffer_x2, blind.buffer_x2)
    before, huge = layer.running_var.clone(), 30 * batches[0]
    y = layer(huge)
    by_itself = huge / ((huge**2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y, by_itself * layer.weight.view(WIDE) + layer.bias.view(WIDE))
    assert int(layer.skip_counter) == 1
    torch.testing.assert_close(layer.buffer_x2[int(layer.iters) % 3], before)
    torch.testing.assert_close(layer.running_var, 0.9 * before + 0.1 * (huge**2).mean((0, 2, 3)))  # as published
    blind(huge)
    assert int(blind.skip_counter) == 0
    assert blind.buffer_x2.max() > 500


def test_before_the_window_is_full_evaluation_has_the_running_mean_and_no_more() -> None:
    """What the official code does: running_var begins at 1, so that a new layer is its affine map."""
    layer = made(window=4)
    x = gaussian(2, 5, 3, 3)
    affine = x / math.sqrt(1 + 1e-5) * layer.weight.view(WIDE) + layer.bias.view(WIDE)
    torch.testing.assert_close(layer.eval()(x), affine)
    layer.train()(3 * x)
    running = 0.9 + 0.1 * ((3 * x) ** 2).mean((0, 2, 3)).view(WIDE)
    y = x / (running + 1e-5).sqrt() * layer.weight.view(WIDE) + layer.bias.view(WIDE)
    torch.testing.assert_close(layer.eval()(x), y)


def test_a_window_that_was_emptied_while_the_count_went_on_stands_for_the_running_mean() -> None:
    """As a federated round leaves it. The geometric mean of a zero is 0, and the output would be x / sqrt(eps)."""
    layer = made(window=4, warmup_iters=0, outlier_filtration=False)
    for number in range(9):
        layer(gaussian(6, 5, 4, 4, seed=number))
    layer.buffer_x2.zero_()
    before, x = layer.running_var.clone(), gaussian(6, 5, 4, 4, seed=20)
    y = layer(x)
    var = ((x**2).mean((0, 2, 3)) * before**3) ** 0.25
    wanted = x / (var.view(WIDE) + 1e-5).sqrt() * layer.weight.view(WIDE) + layer.bias.view(WIDE)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)


def test_one_value_per_channel_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"UnifiedNormLayer .*more than one value per channel.*\(1, 5\).*model.eval"):
        made()(gaussian(1, 5))
    assert made().eval()(gaussian(1, 5)).shape == (1, 5)


def test_statistics_estimated_anew_are_the_mean_over_batches() -> None:
    layer = made(window=2, warmup_iters=0)
    for number in range(5):
        layer(100 * gaussian(9, 5, 2, 2, seed=number))
    parts = [gaussian(n, 5, 3, 3, seed=n) for n in (4, 7, 5)]
    reestimate(layer, parts)
    torch.testing.assert_close(layer.running_var, sum((part**2).mean((0, 2, 3)) for part in parts) / 3)
    assert (int(layer.iters), int(layer.skip_counter), layer.momentum) == (3, 0, 0.1)


def test_a_federation_averages_the_running_mean_and_begins_with_empty_windows() -> None:
    roles = {key: entry.role for key, entry in norm_plan(made(), RoleRule()).by_key.items()}
    own = dict.fromkeys(("ema_gz", "buffer_x2", "buffer_gz"), Role.RESET)
    shared = ("weight", "bias", "running_var", "iters", "skip_counter")
    assert roles == {**dict.fromkeys(shared, Role.SHARED), **own}


def test_a_boundary_keeps_the_running_mean_and_the_count_of_outliers() -> None:
    from fednorm.cards import NORMS

    kept = {name for name, tensor in NORMS["unified_norm"].tensors.items() if tensor.carry is Carry.KEEP}
    assert kept == {"weight", "bias", "running_var", "skip_counter"}
