"""Diagnostics against their formulas, written out in float64, and cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fednorm.errors import ConfigError, DataError
from fednorm.rng import torch_stream
from fednorm.training import diagnostics as d


def with_singular_values(values: list[float], rows: int = 7, columns: int = 5) -> torch.Tensor:
    generator = torch_stream(3, "ranks")
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def test_dead_units_are_counted_over_samples_and_positions() -> None:
    activations = torch.zeros(10, 4, 2, 5)
    activations[:, 0] = 1.0
    activations[0, 1, 0, 0] = 1.0  # active at one of 100 places
    activations[:3, 2] = -0.5  # negative is active, as after a leaky ReLU: at 30 of 100
    assert d.dead_units(activations).tolist() == [False, False, False, True]
    assert d.dead_units(activations, active_below=0.01).tolist() == [False, False, False, True]
    assert d.dead_units(activations, active_below=0.02).tolist() == [False, True, False, True]
    assert d.dead_units(activations, active_below=0.31).tolist() == [False, True, True, True]
    assert d.dead_units(activations[:, :, 0, 0]).tolist() == [False, False, False, True]


def test_dormant_units_are_small_beside_their_layer() -> None:
    activations = torch.zeros(4, 5)
    activations[:, 0] = 100.0
    activations[:, 1] = -0.5  # score 0.5 / 20.2 = 0.02475
    activations[:, 2] = 0.52  # score 0.0257
    assert d.dormant_units(activations).tolist() == [False, True, False, True, True]
    assert d.dormant_units(activations, tau=0.03).tolist() == [False, True, True, True, True]
    assert d.dormant_units(torch.zeros(4, 5)).all()


@pytest.mark.parametrize(
    ("values", "srank", "approximate", "threshold"),
    [
        ([1.0, 1.0, 1.0], 3, 3, 3),
        ([10.0, 1.0, 0.05], 2, 1, 2),  # sums 11.05 (0.995 after two), squares 101.0025 (0.990 after one)
        ([10.0, 1.2, 0.2], 3, 2, 3),  # 0.982 after two of the sum; 0.9856 after one of the squares
        ([5.0], 1, 1, 1),
    ],
)
def test_ranks_by_their_definitions(values: list[float], srank: int, approximate: int, threshold: int) -> None:
    features = with_singular_values(values)
    assert (d.srank(features), d.approximate_rank(features)) == (srank, approximate)
    assert d.threshold_rank(features) == threshold
    p = np.array(values) / sum(values)
    assert d.entropy_rank(features) == pytest.approx(math.exp(-(p * np.log(p)).sum()), abs=1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_ranks_are_between_one_and_the_smaller_side(rows: int, columns: int, seed: int) -> None:
    features = torch.randn(rows, columns, generator=torch_stream(seed, "features"), dtype=torch.float64)
    most = min(rows, columns)
    ranks = (d.entropy_rank(features), d.srank(features), d.approximate_rank(features), d.threshold_rank(features))
    assert all(1 - 1e-9 <= rank <= most + 1e-9 for rank in ranks)
    assert d.approximate_rank(features) <= d.srank(features)
    assert d.entropy_rank(7.5 * features) == pytest.approx(ranks[0])


def test_a_matrix_of_zeros_has_no_rank() -> None:
    zeros = torch.zeros(3, 4)
    assert (d.entropy_rank(zeros), d.srank(zeros), d.approximate_rank(zeros), d.threshold_rank(zeros)) == (0, 0, 0, 0)


def test_norms_and_effective_learning_rates_by_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[3].weight.copy_(torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]))
    conv = 0.5 * math.sqrt(2 * 3 * 9)
    assert d.weight_norms(model) == {"0": pytest.approx(conv), "3": pytest.approx(5.0)}
    assert d.effective_learning_rates(model, 0.1, optimizer="sgd")["3"] == pytest.approx(0.1 / 25)
    assert d.effective_learning_rates(model, 0.1, optimizer="adam")["0"] == pytest.approx(0.1 / conv)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert d.mean_weight_magnitude(model) == pytest.approx(float(flat.abs().mean()))


def test_the_effective_learning_rate_is_what_the_direction_of_a_scale_invariant_weight_feels() -> None:
    def turned(scale: float) -> float:
        layer = nn.Linear(6, 4, bias=False).double()
        generator = torch_stream(5, "direction")
        x, y = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (6, 4))
        with torch.no_grad():
            layer.weight.copy_(scale * torch.randn(4, 6, generator=generator, dtype=torch.float64))
        before = layer.weight.detach() / layer.weight.detach().norm()
        rate = 1e-6 / d.effective_learning_rates(layer, 1.0, optimizer="sgd")[""]
        (nn.functional.batch_norm(layer(x), None, None, training=True, eps=1e-12) * y).sum().backward()
        assert layer.weight.grad is not None
        after = layer.weight.detach() - rate * layer.weight.grad
        return float((after / after.norm() - before).norm())

    assert turned(10.0) == pytest.approx(turned(1.0), rel=1e-4)


def test_relative_updates() -> None:
    before = {"w": torch.tensor([3.0, 4.0])}
    assert d.relative_updates(before, {"w": torch.tensor([3.0, 3.0])}) == {"w": pytest.approx(0.2)}
    with pytest.raises(DataError, match="only one has v, w"):
        d.relative_updates(before, {"v": torch.ones(2)})


def moments(seed: int, channels: int = 4) -> d.Moments:
    generator = torch_stream(seed, "moments")
    draw = {"generator": generator, "dtype": torch.float64}
    return d.Moments(torch.randn(channels, **draw), torch.rand(channels, **draw) + 0.2)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_drift_against_its_formula(seed: int) -> None:
    running, reference, eps = moments(seed), moments(seed + 1), 1e-5
    total, kl = 0.0, 0.0
    for mu, var, m, v in zip(running.mean, running.var, reference.mean, reference.var, strict=True):
        sigma, s = math.sqrt(var + eps), math.sqrt(v + eps)
        total += ((float(mu - m)) ** 2 + (sigma - s) ** 2) / s**2
        ours = torch.distributions.Normal(mu, sigma)
        kl += float(torch.distributions.kl_divergence(torch.distributions.Normal(m, s), ours))
    assert d.wasserstein_drift(running, reference) == pytest.approx(math.sqrt(total / 4))
    assert d.kl_drift(running, reference) == pytest.approx(kl / 4)
    assert d.wasserstein_drift(running, running) == 0
    assert d.kl_drift(running, running) == pytest.approx(0, abs=1e-12)
    moved = [d.Moments(2.5 * x.mean + 3, 2.5**2 * x.var) for x in (running, reference)]
    assert d.wasserstein_drift(*moved, eps=0) == pytest.approx(d.wasserstein_drift(running, reference, eps=0))


def test_drift_by_layer_wants_the_same_layers() -> None:
    by_layer = {"a": moments(1), "b": moments(2)}
    drift = d.drift_by_layer(by_layer, {"b": moments(2), "a": moments(3)})
    assert drift["b"] == 0
    assert drift["a"] == d.wasserstein_drift(moments(1), moments(3))
    with pytest.raises(DataError, match="only one has b"):
        d.drift_by_layer(by_layer, {"a": moments(1)})
    with pytest.raises(DataError, match="one shape"):
        d.kl_drift(moments(1), moments(1, channels=3))


def test_mistakes_are_told() -> None:
    for rank in (d.entropy_rank, d.srank, d.approximate_rank, d.threshold_rank):
        with pytest.raises(DataError, match=r"shape \(n, d\), not empty; got \(2, 3, 4\)"):
            rank(torch.ones(2, 3, 4))
    for units in (d.dead_units, d.dormant_units):
        with pytest.raises(DataError, match=r"got \(0, 3\)"):
            units(torch.ones(0, 3))
    with pytest.raises(ConfigError, match="sgd and adam; got 'lion'"):
        d.effective_learning_rates(nn.Linear(1, 1), 0.1, optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Identity has no parameter"):
        d.mean_weight_magnitude(nn.Identity())


def test_drifts_of_several_are_those_of_each() -> None:
    draw = torch.Generator().manual_seed(3)
    clients = [d.Moments(torch.randn(5, generator=draw), torch.rand(5, generator=draw)) for _ in range(4)]
    joint = d.Moments(torch.randn(5, generator=draw), torch.rand(5, generator=draw))
    assert d.wasserstein_drifts(clients, joint) == pytest.approx([d.wasserstein_drift(c, joint) for c in clients])
    assert d.wasserstein_drifts([], joint) == []
