"""What is peculiar to the rivals on streams: CN, TBBN, batch renormalization, switchable norm, corrected momentum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fednorm.errors import ConfigError, DataError
from fednorm.norms import make_norm
from fednorm.norms.batch_norm_corrected import corrected_momentum
from fednorm.norms.batch_renorm import BatchRenormLayer
from fednorm.norms.task_balanced_norm import TaskBalancedNormLayer, num_parts


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaken(name: str, channels: int, spatial_dims: int = 2, **options: Any) -> nn.Module:
    layer = make_norm(name, options).layer(channels, spatial_dims).double()
    for index, parameter in enumerate(layer.parameters()):
        parameter.data += 0.5 * gaussian(*parameter.shape, seed=index)
    return layer


def test_running_moments_of_continual_norm_are_those_of_the_group_normalized_maps() -> None:
    layer, x = shaken("continual_norm", 4, momentum=0.25), gaussian(3, 4, 2, 2) + 3
    z = functional.group_norm(x, 2)
    layer(x)
    state = layer.state_dict()
    torch.testing.assert_close(state["running_mean"], 0.25 * z.mean((0, 2, 3)))
    torch.testing.assert_close(state["running_var"], 0.75 + 0.25 * z.transpose(0, 1).flatten(1).var(1))
    assert state["num_batches_tracked"] == 1
    expected = functional.batch_norm(z, state["running_mean"], state["running_var"], state["weight"], state["bias"])
    torch.testing.assert_close(layer.eval()(x), expected)


def test_thirty_two_groups_do_not_divide_a_slim_resnets_channels() -> None:
    with pytest.raises(ConfigError, match=r"has 20 channels and num_groups is 32\. Set num_groups to one of 1, 2, 4"):
        make_norm("continual_norm", {"num_groups": 32}).layer(20, 2)


def task_balanced(x: Tensor, layer: TaskBalancedNormLayer, current: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return TBBN's output and the mean over parts of their means and unbiased variances, part by part."""
    memory, y, means, variances = x[current:], torch.zeros_like(x), [], []
    for part in range(parts):
        rows = x[:current][part::parts]
        both = torch.cat((rows, memory)).transpose(0, 1).flatten(1)
        mean, var = both.mean(1), both.var(1, correction=0)
        means.append(mean)
        variances.append(both.var(1))

        def normal(values: Tensor, mean: Tensor = mean, var: Tensor = var) -> Tensor:
            shape = (1, -1, *[1] * (values.ndim - 2))
            scaled = (values - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
            return scaled * layer.weight.view(shape) + layer.bias.view(shape)

        y[:current][part::parts] = normal(rows)
        y[current:] += normal(memory) / parts
    return y, torch.stack(means).mean(0), torch.stack(variances).mean(0)


@settings(deadline=None, max_examples=25)
@given(
    memory=st.integers(1, 4),
    ratio=st.integers(1, 3),
    earlier=st.integers(1, 4),
    positions=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 2**31),
)
def test_task_balanced_norm_is_its_formula_part_by_part(
    memory: int, ratio: int, earlier: int, positions: tuple[int, ...], seed: int
) -> None:
    layer = shaken("task_balanced_norm", 3, len(positions), batch_ratio=ratio)
    assert isinstance(layer, TaskBalancedNormLayer)
    current = ratio * memory
    wanted = max(p for p in range(1, ratio * earlier + 1) if current % p == 0 and memory % p == 0)
    layer.set_tasks(torch.tensor([earlier] * current + [0] * memory), earlier + 1)
    x = gaussian(current + memory, 3, *positions, seed=seed)
    assert layer.division(len(x)) == (current, wanted)
    y, mean, var = task_balanced(x, layer, current, wanted)
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var)
    assert layer.num_batches_tracked == 1


def test_parts_are_those_of_the_paper() -> None:
    """48 + 16 of 64 and a ratio of 3; the reference lists T = 1 to 6."""
    assert [num_parts(48, 16, 3 * t) for t in range(1, 8)] == [2, 4, 8, 8, 8, 16, 16]
    assert num_parts(7, 3, 9) == num_parts(4, 4, 0) == 1


@pytest.mark.parametrize(
    ("tasks", "seen"),
    [
        (None, 3),
        ([0, 0, 0, 0], 1),
        ([2, 2, 2, 0, 0], 3),  # 1 + 1 does not divide 5
        ([2, 1, 2, 0], 3),  # an earlier task's sample among the current ones
    ],
)
def test_a_batch_that_is_not_divided_as_stated_is_normalized_as_a_whole(tasks: list[int] | None, seen: int) -> None:
    layer = shaken("task_balanced_norm", 3, batch_ratio=1)
    assert isinstance(layer, TaskBalancedNormLayer)
    plain = nn.BatchNorm2d(3).double()
    plain.load_state_dict(layer.state_dict())
    layer.set_tasks(torch.tensor([2, 2, 1, 0]), 3)
    x = gaussian(len(tasks or [0] * 4), 3, 2, 2)
    if len(x) == 4:
        assert not torch.allclose(layer(x), plain(x))
        layer.load_state_dict(plain.state_dict())
    layer.set_tasks(None if tasks is None else torch.tensor(tasks), seen)
    assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), plain.state_dict().values(), strict=True))


def test_the_batch_ratio_of_task_balanced_norm_matters_and_sizes_must_agree() -> None:
    divisions = []
    for ratio in (1, 3):
        layer = shaken("task_balanced_norm", 3, batch_ratio=ratio)
        assert isinstance(layer, TaskBalancedNormLayer)
        layer.set_tasks(torch.tensor([1] * 12 + [0] * 4 if ratio == 3 else [1] * 8 + [0] * 8), 2)
        divisions.append(layer.division(16))
    assert divisions == [(8, 1), (12, 2)]
    with pytest.raises(DataError, match="tasks of 16 samples and then a batch of 5"):
        layer(gaussian(5, 3, 2, 2))


def renormalized(layer: BatchRenormLayer, x: Tensor, r_bound: float, d_bound: float) -> Tensor:
    mean, sd = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()
    running_sd = layer.running_var.sqrt()
    r = (sd / running_sd).clamp(1 / r_bound, r_bound)
    d = ((mean - layer.running_mean) / running_sd).clamp(-d_bound, d_bound)
    one = (1, -1, 1, 1)
    y = (x - mean.view(one)) / sd.view(one) * r.view(one) + d.view(one)
    return y * layer.weight.view(one) + layer.bias.view(one)


def test_batch_renorm_is_its_formula_while_its_bounds_widen_and_after_a_restart() -> None:
    layer = shaken("batch_renorm", 3, growth=0.1, r_max=2.5, d_max=1.0, momentum=0.2)
    bounds = []
    for index in range(6):
        assert isinstance(layer, BatchRenormLayer)
        bounds.append((layer.r_bound, layer.d_bound))
        x = (1 + index) * gaussian(4, 3, 2, 2, seed=index) + index
        expected = renormalized(layer, x, *bounds[-1]).detach()
        sd = 0.8 * layer.running_var.sqrt() + 0.2 * (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.running_var.sqrt(), sd)
        restarted = shaken("batch_renorm", 3, growth=0.1, r_max=2.5, d_max=1.0, momentum=0.2)
        restarted.load_state_dict(layer.state_dict())
        layer = restarted
    # Growth is 0.1 * 4 a step and may overshoot once: 1 + 4 * 0.4 = 2.6, and 3 * 0.4 = 1.2.
    wanted = [(1, 0), (1.4, 0.4), (1.8, 0.8), (2.2, 1.2), (2.6, 1.2), (2.6, 1.2)]
    assert [b for pair in bounds for b in pair] == pytest.approx([b for pair in wanted for b in pair])
    layer.reset_running_stats()
    assert (layer.r_bound, layer.d_bound, layer.running_var.tolist()) == (1.0, 0.0, [1.0] * 3)  # type: ignore[operator, union-attr]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 4), c=st.integers(2, 5), h=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_switch_norm_mixes_pytorchs_own_layers_moments(n: int, c: int, h: int, seed: int) -> None:
    """A second derivation: the moments as var_mean over the axes of each, not by the law of total variance."""
    layer, x = shaken("switch_norm", c), gaussian(n, c, h, 2, seed=seed) * 2 + 1
    a, b = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)  # type: ignore[operator, union-attr]
    gradient, shape = gaussian(n, c, h, 2, seed=seed + 1), (1, c, 1, 1)
    mixed_mean, mixed_var = torch.zeros_like(x), torch.zeros_like(x)
    leaf = x.clone().requires_grad_()
    for k, axes in enumerate([(2, 3), (1, 2, 3), (0, 2, 3)]):
        var, mean = torch.var_mean(leaf, axes, correction=0, keepdim=True)
        mixed_mean, mixed_var = mixed_mean + a[k] * mean, mixed_var + b[k] * var
    y = (leaf - mixed_mean) / (mixed_var + 1e-5).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)  # type: ignore[operator, union-attr]
    parameters = list(layer.parameters())
    expected = torch.autograd.grad((y * gradient).sum(), (leaf, *parameters))
    ours = x.clone().requires_grad_()
    torch.testing.assert_close(layer(ours), y, rtol=1e-9, atol=1e-10)
    layer.load_state_dict({**layer.state_dict(), "running_mean": torch.zeros(c), "running_var": torch.ones(c)})
    found = torch.autograd.grad((layer(ours) * gradient).sum(), (ours, *parameters))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=0))


@pytest.mark.parametrize(
    ("gate", "layer"),
    [(0, nn.InstanceNorm2d(4)), (1, nn.GroupNorm(1, 4)), (2, nn.BatchNorm2d(4))],
    ids=["instance", "layer", "batch"],
)
def test_switch_norm_with_one_gate_open_is_that_layer(gate: int, layer: nn.Module) -> None:
    switch = make_norm("switch_norm").layer(4, 2).double()
    for gates in (switch.mean_weight, switch.var_weight):
        gates.data.fill_(-100.0)[gate] = 100.0
    x = gaussian(3, 4, 2, 3)
    torch.testing.assert_close(switch(x), layer.double()(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_corrected_running_moments_are_geometric_weights_without_the_initial_values(kappa: float) -> None:
    layer = shaken("batch_norm_corrected", 3, kappa=kappa, momentum=0.2)
    plain = nn.BatchNorm2d(3).double()
    plain.load_state_dict(layer.state_dict())
    batches = [gaussian(4, 3, 2, 2, seed=s) + s for s in range(5)]
    for x in batches:
        assert torch.equal(layer(x), plain(x))
    weights = torch.tensor([(0.8**kappa) ** (4 - s) for s in range(5)], dtype=torch.float64)
    weights /= weights.sum()
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches])
    torch.testing.assert_close(layer.running_mean, weights @ means)
    torch.testing.assert_close(layer.running_var, weights @ variances)
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert corrected_momentum(10**5, 0.1, 0.4) == pytest.approx(1 - 0.9**0.4)
