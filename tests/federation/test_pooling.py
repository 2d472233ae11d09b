"""Pooled moments are the moments of the samples' union."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednorm.errors import AggregationError
from fednorm.federation.pooling import pool_moments

sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def samples(counts: list[int], channels: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-2, 3, (len(counts), channels), generator=draw)
    centre = 100 * torch.randn(len(counts), channels, generator=draw, dtype=torch.float64)
    return [
        centre[i] + spread[i] * torch.randn(n, channels, generator=draw, dtype=torch.float64)
        for i, n in enumerate(counts)
    ]


@settings(max_examples=60, deadline=None)
@given(counts=sizes, channels=st.integers(1, 4), seed=st.integers(0, 2**32), factor=st.sampled_from([1.0, 0.125, 743]))
def test_pooled_moments_are_those_of_the_concatenation(
    counts: list[int], channels: int, seed: int, factor: float
) -> None:
    parts = samples(counts, channels, seed)
    whole = torch.cat(parts)
    mean, var = pool_moments(
        [part.mean(0) for part in parts],
        [part.var(0, unbiased=False) for part in parts],
        [factor * n for n in counts],
    )
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(var, whole.var(0, unbiased=False), rtol=1e-8, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 7), min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_pooling_in_two_steps_is_pooling_at_once(counts: list[int], seed: int) -> None:
    parts = samples(counts, 3, seed)
    means, variances = [p.mean(0) for p in parts], [p.var(0, unbiased=False) for p in parts]
    first = pool_moments(means[:-1], variances[:-1], counts[:-1])
    both = pool_moments([first[0], means[-1]], [first[1], variances[-1]], [sum(counts[:-1]), counts[-1]])
    at_once = pool_moments(means, variances, counts)
    for a, b in zip(both, at_once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_two_clients_with_variance_one_and_means_zero_and_four_have_variance_five() -> None:
    one, means = torch.ones(1), [torch.zeros(1), torch.full((1,), 4.0)]
    mean, var = pool_moments(means, [one, one], [1, 1])
    assert (mean.item(), var.item()) == (2.0, 5.0)


def test_a_sample_of_weight_zero_does_not_count() -> None:
    mean, var = pool_moments([torch.ones(2), torch.full((2,), 9.0)], [torch.ones(2), torch.ones(2)], [3, 0])
    assert (mean.tolist(), var.tolist()) == ([1, 1], [1, 1])


def test_sums_are_in_float64_whatever_came_and_inputs_are_not_changed() -> None:
    means = [torch.full((1,), 1e4), torch.full((1,), 1e4 + 2**-9)]  # squared, their difference is lost in float32
    variances = [torch.zeros(1), torch.zeros(1)]
    mean, var = pool_moments(means, variances, [1, 1])
    assert mean.dtype == var.dtype == torch.float64
    gap = float(means[1]) - float(means[0])
    assert var.item() == pytest.approx(gap**2 / 4, rel=1e-9)
    assert gap > 0
    assert (means[0].item(), variances[1].item()) == (1e4, 0)


@pytest.mark.parametrize(("count", "words"), [([], r"counts \[\]"), ([0, 0.0], r"counts \[0, 0\.0\]")])
def test_nothing_to_pool_is_an_error(count: list[float], words: str) -> None:
    with pytest.raises(AggregationError, match=words):
        pool_moments([torch.zeros(1) for _ in count], [torch.zeros(1) for _ in count], count)
