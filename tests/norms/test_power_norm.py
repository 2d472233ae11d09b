"""PowerNorm's forward and backward pass, written out, through warm-up and after it; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fednorm.errors import ConfigError, DataError
from fednorm.federation.plan import norm_plan
from fednorm.norms import make_norm
from fednorm.norms.power_norm import PowerNormLayer
from fednorm.roles import NORMALIZATION, Carry, Kind, Role, RoleRule
from fednorm.training.recalibration import reestimate


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(channels: int = 6, **options: Any) -> PowerNormLayer:
    layer = make_norm("power_norm", options).layer(channels, 2).double()
    layer.weight.data += 0.3 * gaussian(channels, seed=90)
    layer.bias.data += gaussian(channels, seed=91)
    assert isinstance(layer, PowerNormLayer)
    return layer


def scaled(x: Tensor, groups: int) -> Tensor:
    """Return u, channel by channel."""
    size = x.shape[1] // groups
    squares = [(x[:, g * size : (g + 1) * size] ** 2).sum(1) / size for g in range(groups)]
    return torch.stack([x[:, c] / (squares[c // size] + 1e-5).sqrt() for c in range(x.shape[1])], 1)


@pytest.mark.parametrize("backward_scale", ["batch", "running"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_every_step_is_that_of_the_formulas(backward_scale: str, warmup: int) -> None:
    layer = made(num_groups=2, warmup_iters=warmup, backward_scale=backward_scale, alpha_fwd=0.8, alpha_bkw=0.7)
    phi, nu = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    wide = (1, 6, 1, 1)
    for t in range(1, 8):
        x, gy = (1 + t) * gaussian(3, 6, 2, 4, seed=t), gaussian(3, 6, 2, 4, seed=20 + t)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(gy)
        # Written out, the true gradient of the group scaling by autograd.
        whole = x.clone().requires_grad_()
        u = scaled(whole, 2)
        q = (u.detach() ** 2).mean((0, 2, 3))
        divisor = q if t <= warmup else phi
        z = u.detach() / (divisor.view(wide) + 1e-5).sqrt()
        torch.testing.assert_close(y, z * layer.weight.view(wide) + layer.bias.view(wide), rtol=1e-12, atol=1e-12)
        if t < warmup:
            phi = phi * (t - 1) / t + q / t
        phi = 0.8 * phi + 0.2 * q
        a = gy * layer.weight.detach().view(wide) - 0.3 * nu.view(wide) * z
        nu = nu + (a * z).mean((0, 2, 3))
        below = q if backward_scale == "batch" else divisor
        u.backward(a / (below.view(wide) + 1e-5).sqrt())
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        for ours, right in (
            (leaf.grad, whole.grad), (layer.weight.grad, (gy * z).sum((0, 2, 3))), (layer.bias.grad, gy.sum((0, 2, 3))),
            (layer.running_phi, phi), (layer.ema_gz, nu),
        ):  # fmt: skip
            torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)
    x = gaussian(3, 6, 2, 4, seed=50)
    y = scaled(x, 2) / (phi.view(wide) + 1e-5).sqrt() * layer.weight.view(wide) + layer.bias.view(wide)
    torch.testing.assert_close(layer.eval()(x), y, rtol=1e-12, atol=1e-12)


def test_the_published_backward_pass_is_not_the_gradient() -> None:
    layer = made(warmup_iters=100)
    x = gaussian(3, 6, 2, 2).requires_grad_()
    assert not torch.autograd.gradcheck(layer, (x,), raise_exception=False)
    assert torch.autograd.gradcheck(layer.group_scaled, (x,))
    assert torch.autograd.gradcheck(layer.eval(), (x,))


def test_the_length_of_the_input_does_not_matter() -> None:
    """The group scaling takes it away, after the warm-up and in evaluation too."""
    layer = made(warmup_iters=0, eps=1e-12)
    x = 100 * gaussian(4, 6, 3, 3)
    for _ in range(3):
        layer(x)
    torch.testing.assert_close(layer.eval()(50 * x), layer(x), rtol=1e-6, atol=1e-6)


def test_padding_enters_no_statistic_and_is_normalized_all_the_same() -> None:
    one, other = made(), made()
    x = gaussian(3, 6, 5)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = True
    spoiled = x.clone()
    spoiled[:, :, 3:] = 1000 * gaussian(3, 6, 2, seed=4)
    torch.testing.assert_close(one(spoiled, mask)[:, :, :3], other(x[:, :, :3]))
    torch.testing.assert_close(one.running_phi, other.running_phi)
    with pytest.raises(DataError, match=r"boolean pad_mask of shape \(3, 5\).*got torch.bool of shape \(5, 3\)"):
        one(x, mask.T)
    with pytest.raises(DataError, match=r"got torch.float32 of shape \(3, 5\)"):
        one(x, mask.float())


def test_what_leaves_only_signs_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"PowerNormLayer .*more than one value per channel.*\(1, 6\).*model.eval"):
        made()(gaussian(1, 6))
    assert made().eval()(gaussian(1, 6)).shape == (1, 6)
    for channels, groups in ((1, 1), (6, 6)):
        with pytest.raises(ConfigError, match="leaves nothing"):
            make_norm("power_norm", {"num_groups": groups}).layer(channels, 2)
    with pytest.raises(DataError, match=r"expects an input \(N, 6, ...\); got shape \(3, 5, 2, 2\)"):
        made()(gaussian(3, 5, 2, 2))


def test_statistics_estimated_anew_are_the_mean_over_batches() -> None:
    layer = made()
    layer(gaussian(9, 6, 2, 2, seed=3))
    parts = [gaussian(n, 6, 3, 3, seed=n) for n in (4, 7)]
    reestimate(layer, parts)
    squares = [(scaled(part, 1) ** 2).mean((0, 2, 3)) for part in parts]
    torch.testing.assert_close(layer.running_phi, (squares[0] + squares[1]) / 2)
    assert int(layer.iters) == 2
    assert layer.momentum == pytest.approx(0.1)


def test_a_federation_averages_phi_and_begins_with_no_gradient_statistic() -> None:
    """A quadratic mean of the union is the weighted mean of the clients': what variances are not."""
    kinds = {"weight": Kind.SCALE, "bias": Kind.SHIFT, "running_phi": Kind.QUADRATIC, "ema_gz": Kind.GRAD_STAT}
    plan = norm_plan(made(), RoleRule())
    assert {key: entry.kind for key, entry in plan.by_key.items()} == {**kinds, "iters": Kind.COUNT}
    roles = {key: entry.role for key, entry in plan.by_key.items()}
    assert roles == {**dict.fromkeys(("weight", "bias", "running_phi", "iters"), Role.SHARED), "ema_gz": Role.RESET}
    local = norm_plan(made(), RoleRule(dict.fromkeys(NORMALIZATION, Role.LOCAL)))
    assert set(local.local) == set(roles)


def test_only_the_gradient_statistic_is_stale_at_a_boundary() -> None:
    from fednorm.cards import NORMS

    reset = {name for name, tensor in NORMS["power_norm"].tensors.items() if tensor.carry is Carry.RESET}
    assert reset == {"ema_gz"}
