"""Norms of tokens, and of positions of feature maps: against installed implementations and written-out formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.cards import NORMS
from fednorm.conversion import convert, convert_with_report
from fednorm.errors import ConfigError, DataError
from fednorm.norms import make_norm, spec_of
from fednorm.norms.layer_norm import ChannelLayerNorm
from fednorm.roles import Carry, Kind
from fednorm.training.step import batch_coupled

TOKENS = (
    "bhyt", "crms_norm", "dyt", "gated_norm", "layer_norm_channels", "pre_affine", "seednorm",
)  # fmt: skip
"""Methods that look at each position by itself."""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaken(name: str, channels: int = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = make_norm(name, options).layer(channels, 2).double()
    for number, parameter in enumerate(layer.parameters()):
        parameter.data += 0.3 * gaussian(*parameter.shape, seed=number)
    return layer


# Every token norm.


@settings(deadline=None, max_examples=10)
@given(positions=st.lists(st.integers(1, 4), min_size=0, max_size=4), name=st.sampled_from(TOKENS))
def test_each_position_is_normalized_as_if_it_were_alone(positions: list[int], name: str) -> None:
    layer, x = shaken(name), gaussian(2, 6, *positions)
    alone = layer(x.movedim(1, -1).reshape(-1, 6))
    torch.testing.assert_close(layer(x), alone.view(2, *positions, 6).movedim(-1, 1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [*TOKENS, "l1_norm"])
def test_the_memory_layout_of_a_map_is_kept(name: str) -> None:
    x = gaussian(2, 6, 3, 4)
    layer = shaken(name)
    assert layer(x).is_contiguous()
    assert layer(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    volume = gaussian(2, 6, 3, 4, 2).contiguous(memory_format=torch.channels_last_3d)
    assert layer(volume).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", [*TOKENS, "l1_norm"])
@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 5, 6)])
def test_other_channels_are_refused_with_both_shapes(name: str, shape: tuple[int, ...]) -> None:
    if name == "layer_norm_channels":
        pytest.skip("PyTorch's layer has words of its own")
    with pytest.raises(DataError, match=r"expects an input \(N, 6, \.\.\.\); got shape \("):
        shaken(name)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", [*TOKENS, "l1_norm", "weight_compander"])
def test_cards_say_how_a_method_was_verified_and_what_its_tensors_are(name: str) -> None:
    card = NORMS[name]
    assert card.verified
    assert all(tensor.carry is Carry.KEEP for tensor in card.tensors.values())
    guessed = {"gated_norm", "l1_norm", "seednorm", "weight_compander"}
    assert bool(card.reconstruction) == (name in guessed)


@pytest.mark.parametrize("name", TOKENS)
def test_a_transformer_takes_it(name: str) -> None:
    """Channels last, without a word: each token by itself, whatever the order of batch and length."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    first = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    converted, report = convert_with_report(first.double().eval(), name)
    assert len(report.layers) == 3
    x = gaussian(5, 3, 8)
    torch.testing.assert_close(converted(x)[:, :1], converted(x[:, :1]))


@pytest.mark.parametrize("name", ["gated_norm", "pre_affine", "seednorm"])
def test_it_begins_as_rms_normalization(name: str) -> None:
    layer, x = make_norm(name).layer(6, 0).double(), gaussian(4, 6)
    torch.testing.assert_close(layer(x), nn.RMSNorm(6, eps=1e-5).double()(x), rtol=1e-12, atol=1e-14)


# Layer normalization by its names.


def test_the_forms_of_layer_normalization_are_those_of_other_libraries_and_differ() -> None:
    x = gaussian(3, 6, 2, 4) * torch.arange(1, 7).view(1, 6, 1, 1) + 1
    forms: dict[str, tuple[Any, nn.Module]] = {
        "layer_norm": (shaken("layer_norm"), nn.GroupNorm(1, 6).double()),
        "group_norm": (shaken("group_norm", num_groups=1), nn.GroupNorm(1, 6).double()),
        "layer_norm_channels": (shaken("layer_norm_channels", eps=1e-6), timm.layers.LayerNorm2d(6).double()),
        "channels": (shaken("layer_norm", over="channels", eps=1e-6), timm.layers.LayerNorm2d(6).double()),
    }
    outputs = {}
    for name, (ours, theirs) in forms.items():
        theirs.load_state_dict(ours.state_dict())
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs[name] = ours(one)
        torch.testing.assert_close(outputs[name], theirs(other), rtol=1e-12, atol=1e-12)
        for y, leaf in ((outputs[name], one), (theirs(other), other)):
            (y * gaussian(*y.shape, seed=2)).sum().backward()
            assert leaf.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert torch.equal(outputs["layer_norm"], outputs["group_norm"])
    assert torch.equal(outputs["layer_norm_channels"], outputs["channels"])
    assert not torch.allclose(outputs["layer_norm"], outputs["layer_norm_channels"], atol=1e-2)


def test_the_form_at_each_position_has_a_name_of_its_own_and_no_code_of_its_own() -> None:
    layer = shaken("layer_norm_channels")
    card = spec_of(layer)
    assert card is not None
    assert card.name == "layer_norm_channels"
    assert type(layer).forward is ChannelLayerNorm.forward
    other = spec_of(shaken("layer_norm", over="channels"))
    assert other is not None
    assert other.name == "layer_norm"


def test_converting_one_form_to_its_other_name_keeps_the_layer_and_the_function() -> None:
    trained = timm.layers.LayerNorm2d(6).double()
    trained.weight.data = gaussian(6)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1).double(), trained), gaussian(2, 3, 4, 4)
    assert torch.equal(convert(model, "layer_norm_channels")(x), model(x))
    named = nn.Sequential(nn.Conv2d(3, 6, 1).double(), shaken("layer_norm_channels"))
    assert torch.equal(convert(named, "layer_norm")(x), named(x))
    sample = nn.Sequential(nn.Conv2d(3, 6, 1).double(), shaken("layer_norm"))
    converted = convert(sample, "layer_norm_channels")
    card = spec_of(converted[1])  # type: ignore[index]
    assert card is not None
    assert card.name == "layer_norm_channels"


# RMS and CRMS normalization.


def test_rms_normalization_at_each_position_is_timms() -> None:
    ours, theirs = shaken("rms_norm", over="channels", eps=1e-6), timm.layers.RmsNorm2d(6).double()
    theirs.load_state_dict(ours.state_dict())
    x = gaussian(3, 6, 2, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_crms_is_rms_of_the_whole_vector_and_layer_normalization_of_one_with_zero_mean() -> None:
    vector = gaussian(5, 7)
    vector = vector - vector.mean(1, keepdim=True)
    y = make_norm("crms_norm").layer(6, 0).double()(vector[:, :6])
    torch.testing.assert_close(y, nn.RMSNorm(7, eps=1e-5, elementwise_affine=False)(vector)[:, :6])
    torch.testing.assert_close(y, nn.LayerNorm(7, elementwise_affine=False)(vector)[:, :6])


# Bounded and gated norms.


def test_bhyt_is_bounded_and_almost_never_saturated() -> None:
    layer = make_norm("bhyt").layer(512, 0)
    x = 1e4 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) ** 3  # heavy tails
    inner = x * (2 / 10) / x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x).detach(), inner.tanh())
    assert (inner.abs() <= 2).float().mean() >= 0.99  # Chebyshev: at most 1 / kappa^2 of the numbers are larger


def test_the_dynamic_scale_of_seednorm_is_dropped_out_in_training_only() -> None:
    layer, plain = shaken("seednorm", dropout=0.5), shaken("seednorm")
    x = gaussian(4, 6)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    torch.manual_seed(0)
    trained = layer.train()(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), trained)
    kept = nn.RMSNorm(6, eps=1e-5, elementwise_affine=False)(x) * layer.weight
    twice = kept + 2 * (plain(x) - kept)  # what is not dropped counts 1 / (1 - 0.5)
    assert torch.all(torch.isclose(trained, kept) | torch.isclose(trained, twice))
    assert 0 < int(torch.isclose(trained, kept).sum()) < 24


@pytest.mark.parametrize(
    ("channels", "heads"), [(1, 1), (6, 1), (16, 2), (48, 6), (60, 6), (192, 16), (768, 16), (97, 1)]
)
def test_heads_of_seednorm_divide_the_channels(channels: int, heads: int) -> None:
    layer: Any = make_norm("seednorm").layer(channels, 2)
    assert layer.num_heads == heads


def test_heads_that_do_not_divide_the_channels_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"has 15 channels and num_heads is 4\. Set num_heads to one of 1, 3, 5, 15"):
        make_norm("seednorm", {"num_heads": 4}).layer(15, 2)


# L1 normalization.


@pytest.mark.parametrize(("over", "axes"), [("batch", (0, 2, 3)), ("sample", (1, 2, 3)), ("channels", (1,))])
def test_l1_normalization_and_its_gradient_are_those_of_the_formula(over: str, axes: tuple[int, ...]) -> None:
    layer = shaken("l1_norm", over=over, eps=1e-12)
    x, grad = gaussian(4, 6, 3, 2).requires_grad_(), gaussian(4, 6, 3, 2, seed=1)
    y = layer(x)
    (y * grad).sum().backward()
    factor, shape = math.sqrt(math.pi / 2), (1, 6, 1, 1)

    def mean(t: Tensor) -> Tensor:
        return t.mean(axes, keepdim=True)

    d = x.detach() - mean(x.detach())
    s = factor * mean(d.abs())
    torch.testing.assert_close(y.detach(), d / s * layer.weight.view(shape) + layer.bias.view(shape))
    u = grad * layer.weight.detach().view(shape)
    wanted = (u - mean(u) - (d.sign() - mean(d.sign())) * mean(u * d / s) * factor) / s
    torch.testing.assert_close(x.grad, wanted, rtol=1e-8, atol=1e-10)


def test_l1_normalization_keeps_running_averages_of_mean_and_deviation() -> None:
    layer = make_norm("l1_norm", {"momentum": 0.3}).layer(6, 2).double()
    mean, deviation = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for seed in range(3):
        x = 2 * gaussian(4, 6, 3, 2, seed=seed) + 1
        layer(x)
        own = x.mean((0, 2, 3))
        spread = math.sqrt(math.pi / 2) * (x - own.view(1, 6, 1, 1)).abs().mean((0, 2, 3))
        mean, deviation = 0.7 * mean + 0.3 * own, 0.7 * deviation + 0.3 * spread
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_deviation, deviation)
    assert int(layer.num_batches_tracked) == 3
    x = gaussian(1, 6, 3, 2, seed=9)
    expected = (x - mean.view(1, 6, 1, 1)) / (deviation.view(1, 6, 1, 1) + 1e-5)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert NORMS["l1_norm"].tensors["running_deviation"].kind is Kind.DEVIATION


def test_l1_normalization_of_gaussians_is_nearly_batch_normalization() -> None:
    x = 3 * gaussian(512, 2, 8, 8) + 5
    y = make_norm("l1_norm").layer(2, 2).double()(x)
    assert float((y - nn.BatchNorm2d(2).double()(x)).abs().max().detach()) < 0.05


def test_the_layer_form_of_l1_normalization_does_not_couple_a_batch() -> None:
    for over, coupled in (("batch", True), ("sample", False), ("channels", False)):
        model = nn.Sequential(shaken("l1_norm", over=over))
        assert batch_coupled(model, spec_of) == coupled
    x = gaussian(1, 6)
    shaken("l1_norm", over="sample")(x)
    with pytest.raises(DataError, match="needs more than one value per channel; got shape"):
        shaken("l1_norm")(x)
    with pytest.raises(ConfigError, match="l1_norm over a single feature leaves nothing"):
        make_norm("l1_norm", {"over": "channels"}).layer(1, 2)
