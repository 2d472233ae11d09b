"""RMS normalization against PyTorch's layer, and against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.conversion.replacement import convert
from fednorm.errors import DataError
from fednorm.norms import make_norm, spec_of


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaken(over: str = "sample", channels: int = 7, eps: float = 1e-5) -> nn.Module:
    layer = make_norm("rms_norm", {"over": over, "eps": eps}).layer(channels, 2).double()
    layer.weight.data += gaussian(channels, seed=9)
    return layer


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 4),
    channels=st.integers(1, 6),
    positions=st.lists(st.integers(1, 4), max_size=3),
    over=st.sampled_from(["sample", "channels"]),
    scale=st.floats(-3, 3),
)
def test_every_value_is_that_of_the_formula(
    n: int, channels: int, positions: list[int], over: str, scale: float
) -> None:
    layer = shaken(over, channels)
    x = 10**scale * gaussian(n, channels, *positions)
    y = layer(x)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).view(-1, x.ndim).tolist():
        sample, channel, position = index[0], index[1], index[2:]
        values = x[sample] if over == "sample" else x[(sample, slice(None), *position)]
        square = sum(value**2 for value in values.flatten().tolist()) / values.numel()
        expected = x[tuple(index)].item() / math.sqrt(square + 1e-5) * layer.weight[channel].item()
        assert y[tuple(index)].item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("over", ["sample", "channels"])
def test_features_are_normalized_as_by_pytorch(over: str) -> None:
    ours, theirs = shaken(over, eps=1e-3), nn.RMSNorm(7, eps=1e-3).double()
    theirs.load_state_dict(ours.state_dict())
    x, other = gaussian(5, 7).requires_grad_(), gaussian(5, 7).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(other), rtol=1e-12, atol=1e-14)
    for layer, leaf in ((ours, x), (theirs, other)):
        (layer(leaf) * gaussian(5, 7, seed=2)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-12)


def test_maps_are_normalized_as_by_pytorch_over_the_same_axes() -> None:
    x = gaussian(3, 7, 2, 4)
    whole = nn.RMSNorm([7, 2, 4], eps=1e-5, elementwise_affine=False)
    layer = shaken("sample")
    torch.testing.assert_close(layer(x), whole(x) * layer.weight.view(1, 7, 1, 1))
    layer = shaken("channels")
    last = nn.RMSNorm(7, eps=1e-5).double()
    last.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), last(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("over", ["sample", "channels"])
def test_memory_layout_is_kept(over: str) -> None:
    x = gaussian(2, 7, 3, 4).to(memory_format=torch.channels_last)
    assert shaken(over)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("over", ["sample", "channels"])
def test_a_sample_of_zeros_stays_zero_and_has_a_finite_gradient(over: str) -> None:
    x = torch.zeros(2, 7, 3, dtype=torch.float64, requires_grad=True)
    layer = shaken(over)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    # dy/dx = weight / sqrt(eps) where x is 0.
    torch.testing.assert_close(x.grad, (layer.weight.detach() / math.sqrt(1e-5)).view(1, 7, 1).expand(2, 7, 3))


def test_pytorchs_layer_is_known_and_its_descendants_of_other_methods_are_not_taken_for_it() -> None:
    for module, name in ((nn.RMSNorm(4), "rms_norm"), (shaken(), "rms_norm"), (nn.LayerNorm(4), "layer_norm")):
        spec = spec_of(module)
        assert spec is not None
        assert spec.name == name


def test_converting_pytorchs_layer_keeps_the_function() -> None:
    tokens = nn.Sequential(nn.Linear(5, 5), nn.RMSNorm(5, eps=1e-5)).double()
    tokens[1].weight.data.uniform_()
    x = gaussian(3, 4, 5)
    torch.testing.assert_close(convert(tokens, "rms_norm", over="channels")(x), tokens(x))


@pytest.mark.parametrize("shape", [(7,), (2, 6), (2, 6, 7)])
def test_other_channels_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expects an input \(N, 7, \.\.\.\); got shape \("):
        shaken()(torch.zeros(shape))
