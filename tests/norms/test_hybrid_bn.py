"""Hybrid batch normalization: mixed moments written out, the second pass, and the moments of all clients together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fednorm.errors import DataError
from fednorm.norms import make_norm
from fednorm.norms.hybrid_bn import Estimate, HybridBNLayer, measured, pooled_estimates
from fednorm.training.recalibration import reestimate

WIDE = (1, 4, 1, 1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(momentum: float = 0.1) -> HybridBNLayer:
    layer = make_norm("hybrid_bn").layer(4, 2).double()
    assert isinstance(layer, HybridBNLayer)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data += gaussian(4, seed=90 + seed)
    layer.running_mean += gaussian(4, seed=80)
    layer.running_var += gaussian(4, seed=81).abs()
    layer.momentum = momentum
    return layer


def mixed(x: Tensor, layer: HybridBNLayer) -> tuple[Tensor, Tensor]:
    share = 1 / (1 + (-layer.distribution_factor).exp())
    mean = x.mean((0, 2, 3))
    var = ((x - mean.view(WIDE)) ** 2).mean((0, 2, 3))
    old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()
    return (1 - share) * old_mean + share * mean, (1 - share) * old_var + share * var


def written(x: Tensor, layer: HybridBNLayer) -> Tensor:
    mean, var = mixed(x, layer)
    scaled = (x - mean.view(WIDE)) / (var.view(WIDE) + 1e-5).sqrt()
    return scaled * layer.weight.view(WIDE) + layer.bias.view(WIDE)


def test_output_and_gradients_are_the_formulas() -> None:
    ours, other = made(), made()
    x, gy = 2 * gaussian(3, 4, 2, 3) + 1, gaussian(3, 4, 2, 3, seed=5)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, right = ours(one), written(two, other)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    y.backward(gy)
    right.backward(gy)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-12)
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


def test_the_share_goes_from_all_clients_moments_to_batch_norm() -> None:
    x = gaussian(5, 4, 2, 2)
    layer, batch_norm = made(), nn.BatchNorm2d(4).double()
    batch_norm.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "distribution_factor"})
    with torch.no_grad():
        layer.distribution_factor.fill_(-50)
    layer.momentum = 0.0
    torch.testing.assert_close(layer(x), batch_norm.eval()(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.eval()(x), batch_norm(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.distribution_factor.fill_(50)
    torch.testing.assert_close(layer.train()(x), batch_norm.train()(x), rtol=1e-10, atol=1e-10)


def test_without_a_strategy_the_running_moments_move_as_batch_norm_s() -> None:
    layer, batch_norm = made(), nn.BatchNorm2d(4).double()
    batch_norm.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "distribution_factor"})
    for seed in range(3):
        x = gaussian(3, 4, 2, 2, seed=seed)
        layer(x)
        batch_norm(x)
    torch.testing.assert_close(layer.running_mean, batch_norm.running_mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.running_var, batch_norm.running_var, rtol=1e-12, atol=1e-14)


def test_the_second_pass_finds_mixed_moments_layer_upon_layer_and_changes_nothing() -> None:
    second = made()
    model = nn.Sequential(made(), nn.ReLU(), nn.Dropout(0.5), second).double().train()
    x = gaussian(6, 4, 3, 3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = measured(model, x)
    inner = written(x, model[0]).relu()  # type: ignore[arg-type]  # dropout rests
    for path, batch in (("0", x), ("3", inner)):
        mean, var = mixed(batch, model.get_submodule(path))  # type: ignore[arg-type]
        assert found[path].count == 6
        torch.testing.assert_close(found[path].mean, mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found[path].var, var, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert second.estimate is None
    with pytest.raises(DataError, match="two or more images; got 1"):
        measured(model, x[:1])


def test_the_pooled_moments_are_those_of_the_union() -> None:
    """Of single positions, whose count is that of the samples, and with n - 1."""
    parts = [gaussian(n, 4, seed=n) * n + n for n in (3, 8, 5)]
    estimates = [{"layer": Estimate(len(p), p.mean(0), p.var(0, correction=0))} for p in parts]
    mean, var = pooled_estimates(estimates)["layer"]
    union = torch.cat(parts)
    torch.testing.assert_close(mean, union.mean(0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(var, union.var(0), rtol=1e-12, atol=1e-13)
    assert pooled_estimates([]) == {}
    with pytest.raises(DataError, match="layer 'layer' has 1"):
        pooled_estimates([{"layer": Estimate(1, mean, var)}])


def test_statistics_estimated_anew_are_the_images_own_whatever_the_share() -> None:
    model = nn.Sequential(made(), nn.ReLU(), made()).double()
    batch_norm = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).double()
    kept = {k: v for k, v in model.state_dict().items() if "distribution" not in k}
    batch_norm.load_state_dict(kept)
    parts = [gaussian(n, 4, 3, 3, seed=n) for n in (4, 6)]
    for one in (model, batch_norm):
        reestimate(one, parts)
    for key, right in batch_norm.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], right, rtol=1e-10, atol=1e-12)


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(DataError, match="more than one value per channel"):
        made()(gaussian(1, 4))
