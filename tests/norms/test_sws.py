"""Scaled weight standardization: its variants, its signal propagation, its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.norms import _rows, make_norm, spec_of, sws
from fednorm.norms.sws import GAMMA, ScaledActivation, SWSConv2d
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.roles import Kind
from fednorm.spec import ACTIVATIONS


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_added_eps_is_timms_layer(groups: int) -> None:
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.ScaledStdConv2d(4, 8, 3, groups=groups, gamma=1.0, eps=1e-6, padding=1).double()
    ours = SWSConv2d(4, 8, 3, groups=groups, padding=1, eps=1e-6, floor="add").double()
    theirs.gain.data = gaussian(8, 1, 1, 1)
    ours.load_state_dict(theirs.state_dict())
    x = gaussian(3, 4, 6, 6, seed=1)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_rows_have_mean_zero_and_length_gain() -> None:
    conv = SWSConv2d(6, 9, 3, groups=3).double()
    assert conv.gain is not None
    conv.gain.data = gaussian(9, 1, 1, 1)
    weight = conv.standardized_weight().flatten(1)
    torch.testing.assert_close(weight.sum(1), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(weight.norm(dim=1), conv.gain.flatten().abs(), rtol=1e-12, atol=0)


def test_fan_in_counts_the_inputs_of_one_group() -> None:
    assert SWSConv2d(6, 9, (3, 2), groups=3).fan_in == 2 * 3 * 2


def test_floor_holds_the_scale_of_a_filter_with_little_variance() -> None:
    conv = SWSConv2d(2, 1, 2, bias=False).double()
    kernel = 1e-4 * gaussian(1, 2, 2, 2)
    conv.weight.data = kernel
    # var * N is about 1e-7, far below the floor of 1e-4, so the scale is 1 / sqrt(1e-4) = 100.
    torch.testing.assert_close(conv.standardized_weight(), 100 * (kernel - kernel.mean()), rtol=1e-12, atol=0)


def test_unbiased_variance_shrinks_the_weight_by_a_known_factor() -> None:
    biased, unbiased = SWSConv2d(2, 3, 2).double(), SWSConv2d(2, 3, 2, unbiased=True).double()
    unbiased.load_state_dict(biased.state_dict())
    torch.testing.assert_close(
        unbiased.standardized_weight(), math.sqrt(7 / 8) * biased.standardized_weight(), rtol=1e-12, atol=0
    )


def test_fan_in_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"all its outputs are 0; got weight shape \(4, 1, 1, 1\)"):
        SWSConv2d(4, 4, 1, groups=4)


def test_initial_weights_have_fan_in_variance_and_biases_are_zero() -> None:
    torch.manual_seed(0)
    conv = SWSConv2d(64, 128, 3)
    assert conv.bias is not None
    assert conv.weight.std().item() * math.sqrt(64 * 9) == pytest.approx(1, abs=0.01)
    assert not conv.bias.any()


@pytest.mark.parametrize("name", GAMMA)
def test_gamma_gives_the_activation_unit_variance(name: str) -> None:
    # Gauss-Legendre quadrature of the activation's variance under the standard normal density.
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    f = ACTIVATIONS[name]()(z)
    mean = torch.trapezoid(f * density, z)
    std = torch.trapezoid((f - mean) ** 2 * density, z).sqrt().item()
    assert GAMMA[name] * std == pytest.approx(1, abs=1e-3)


def test_signal_keeps_its_variance_with_gamma_and_loses_it_without() -> None:
    def variance_after(layers: int, *, activation_gain: bool) -> float:
        torch.manual_seed(0)
        norm = make_norm("sws", {"activation_gain": activation_gain})
        x = torch.randn(16, 64, 12, 12)
        for _ in range(layers):
            x = norm.activation("relu")(norm.conv(64, 64, 3, padding=1, padding_mode="circular")(x))
        return x.var(dim=(0, 2, 3)).mean().item()

    # ReLU keeps (1 - 1/pi) / 2 = 0.341 of a centred normal's variance: 0.341 ** 3 = 0.040 after three layers.
    assert variance_after(3, activation_gain=True) == pytest.approx(1, rel=0.15)
    assert variance_after(3, activation_gain=False) == pytest.approx(0.040, rel=0.15)


def test_every_activation_has_a_gamma_and_the_switch_removes_it() -> None:
    assert set(GAMMA) == set(ACTIVATIONS)
    assert isinstance(make_norm("sws").activation("silu"), ScaledActivation)
    assert type(make_norm("sws", {"activation_gain": False}).activation("silu")) is nn.SiLU
    assert type(make_norm("sws").activation("identity")) is nn.Identity


def test_gain_is_a_gain_and_the_rest_are_weights() -> None:
    spec = spec_of(SWSConv2d(2, 2, 3))
    assert spec is not None
    assert {name: tensor.kind for name, tensor in spec.tensors.items()} == {
        "weight": Kind.WEIGHT,
        "bias": Kind.WEIGHT,
        "gain": Kind.GAIN,
    }
    assert not spec.normalizes


def test_fedws_s_scaled_weights_are_a_larger_eps_of_the_group_normalization() -> None:
    """FedWS: GN(conv(x, rho w_hat)) with rho = 1e-3 and eps 1e-5, written out; and the gradient of the raw weight."""
    rho, eps, generator = 1e-3, 1e-5, torch.Generator().manual_seed(4)
    images = torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    flat = weight.flatten(1)
    standardized = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + eps)
    maps = F.conv2d(images, rho * standardized.view_as(weight))
    groups = maps.reshape(5, 2, -1)
    variance = groups.var(2, unbiased=False, keepdim=True)
    expected = ((groups - groups.mean(2, keepdim=True)) / (variance + eps).sqrt()).view_as(maps)
    norm = make_norm("ws_group_norm", {"num_groups": 2, "eps_on": "deviation", "group_eps": eps / rho**2})
    conv, layer = norm.conv(3, 4, 3, bias=False).double(), norm.layer(4, 2).double()
    conv.weight.data.copy_(weight.detach())
    actual = layer(conv(images))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected.pow(3).sum(), weight)
    (got,) = torch.autograd.grad(actual.pow(3).sum(), conv.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    assert float((variance < 1e-4).double().mean()) > 0.5  # where eps counts


# The derivative -------------------------------------------------------------------------------------------------------

VARIANTS: tuple[dict[str, Any], ...] = ({}, {"gain": False}, {"floor": "add", "eps": 1e-6}, {"unbiased": True})
variants = pytest.mark.parametrize("options", VARIANTS, ids=str)


def layer(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> SWSConv2d:
    """A small layer with one row below the floor, and one whose entries are all the same."""
    conv = SWSConv2d(3, 4, 3, **options).to(dtype).to(memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=dtype))
        conv.weight[1] *= 1e-4
        conv.weight[2] = 0.25  # the mean of 27 of them is exact, and the row's length 0
    return conv


def composed(weight: Tensor, gain: Tensor | None, conv: SWSConv2d) -> Tensor:
    """Return the standardized weight as operations that autograd differentiates one by one."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    energy = torch.linalg.vector_norm(centred, dim=1, keepdim=True).square()
    if conv.unbiased:
        energy = energy * (conv.fan_in / (conv.fan_in - 1))
    energy = energy.clamp_min(conv.eps) if conv.floor == "max" else energy + conv.eps * conv.fan_in
    scale = energy.rsqrt() if gain is None else energy.rsqrt() * gain.flatten(1)
    return (centred * scale).view_as(weight)


def learned(conv: SWSConv2d) -> tuple[Tensor, ...]:
    return (conv.weight,) if conv.gain is None else (conv.weight, conv.gain)


def composes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every weight that is composed of operations."""
    count: list[int] = []
    monkeypatch.setattr(sws, "centre", lambda weight: count.append(1) or _rows.centre(weight))
    return count


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("floored", [False, True], ids=["above the floor", "a row below"])
def test_the_weight_and_its_derivative_are_those_of_composed_operations(
    options: dict[str, Any],
    dtype: torch.dtype,
    layout: torch.memory_format,
    floored: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conv, count = layer(options, dtype), composes(monkeypatch)
    if not floored:
        with torch.no_grad():
            conv.weight[1:3] = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(4))
    expected = composed(conv.weight, conv.gain, conv)
    grad = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(3)).to(dtype, memory_format=layout)
    weight = conv.standardized_weight()
    assert len(count) == (floored and conv.floor == "max"), "a weight whose rows all count is normalized in one call"
    close = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    for of, those in zip(
        (weight, *torch.autograd.grad(weight, learned(conv), grad)),
        (expected, *torch.autograd.grad(expected, learned(conv), grad)),
        strict=True,
    ):
        # The gradient of a row whose entries lie close together is as large as its weights are small.
        scale = those.abs().amax(tuple(range(1, those.ndim)), keepdim=True).clamp_min(1e-30)
        torch.testing.assert_close(of / scale, those / scale, **close)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 1, 1, 1), (4, 3, 1, 1)], ids=str)
def test_a_gradient_whose_values_share_their_memory_is_not_written_to(shape: tuple[int, ...]) -> None:
    conv = layer({"floor": "add"}, torch.float64)
    small = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wide, kept = small.expand(conv.weight.shape), small.clone()
    ours = torch.autograd.grad(conv.standardized_weight(), learned(conv), wide)
    full = torch.autograd.grad(composed(conv.weight, conv.gain, conv), learned(conv), wide.clone())
    for one, other in zip(ours, full, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.equal(small, kept)


@pytest.mark.parametrize("eps_on", ["variance", "deviation"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_weight_without_gain_too(eps_on: str, unbiased: bool, layout: torch.memory_format) -> None:
    """Weight standardization before a group normalization, written out in float64, and its derivative."""
    conv = WSConv2d(3, 4, 3, eps=1e-3, eps_on=eps_on, unbiased=unbiased).double().to(memory_format=layout)
    weight = conv.weight.detach().clone().requires_grad_()
    rows = weight.flatten(1)
    var = rows.var(1, correction=int(unbiased), keepdim=True)
    divisor = (var + 1e-3).sqrt() if eps_on == "variance" else var.sqrt() + 1e-3
    expected = ((rows - rows.mean(1, keepdim=True)) / divisor).view_as(weight)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    actual = conv.standardized_weight()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    (wanted,), (got,) = (torch.autograd.grad(w, v, grad) for w, v in ((expected, weight), (actual, conv.weight)))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.few(2)
@variants
def test_the_derivative_and_its_own_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    conv = layer(options, torch.float64)
    with torch.no_grad():
        conv.weight[1:3].normal_(generator=torch.Generator().manual_seed(4))

    def standardized(*_: Tensor) -> Tensor:
        return conv.standardized_weight()  # gradcheck writes to the parameters themselves

    assert torch.autograd.gradcheck(standardized, learned(conv))
    assert torch.autograd.gradgradcheck(standardized, learned(conv))
    conv.weight.requires_grad_(conv.gain is None)
    assert torch.autograd.gradgradcheck(standardized, learned(conv)[-1:]), "and of one of them alone"


def test_a_row_without_variance_gets_the_gradient_zero() -> None:
    conv = layer({})
    conv.standardized_weight()[2].square().sum().backward()
    assert conv.weight.grad is not None
    assert not conv.weight.grad[2].any()


def test_the_layer_stands_in_transforms_of_functions() -> None:
    """Where its tensors are the transform's, and where they are the layer's own and the images are the transform's."""
    conv = layer({}, torch.float64)
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(torch.func.vmap(conv)(images), conv(images))

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(conv, parameters, (image,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(conv.named_parameters()), images)
    conv(images).square().sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.parametrize("size", [4, 24, 64], ids=["small", "medium", "large"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_scaled_relu_is_its_two_operations_to_the_bit(size: int, layout: torch.memory_format) -> None:
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(2, 8, size, size, generator=draw).contiguous(memory_format=layout)
    x[0, 0, 0, :3] = torch.tensor([0.0, math.nan, -0.0])
    grad = torch.randn(x.shape, generator=draw).contiguous(memory_format=layout)
    scaled = ScaledActivation(nn.ReLU(), GAMMA["relu"])
    results = []
    for function in (scaled, lambda each: torch.relu(each) * GAMMA["relu"]):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(grad)
        with torch.no_grad():
            results.append([y.detach(), leaf.grad, function(x)])
    for ours, plain in zip(*results, strict=True):
        assert ours.stride() == plain.stride()
        if size == 4:  # in one operation, which may give -0 for 0, and of NaN the derivative NaN
            ours, plain = (torch.where(x.isnan(), 0.0, each) + 0.0 for each in (ours, plain))
        assert torch.equal(ours.view(torch.int32), plain.view(torch.int32))
    assert x[0, 0, 0, 2] == 0, "the input is not written to"


@pytest.mark.parametrize("size", [8, 64], ids=["small", "large"])
def test_a_scaled_relu_is_differentiated_twice(size: int) -> None:
    x = gaussian(1, 8, size, size).requires_grad_()
    y = ScaledActivation(nn.ReLU(), 1.5)(x)
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(twice, torch.where(x > 0, 6 * 1.5**3 * x, 0.0).detach())


@pytest.mark.parametrize("how", ["forward hook", "own forward", "in place"])
def test_a_nonlinearity_that_is_more_than_torchs_function_is_called(how: str) -> None:
    scaled, seen = ScaledActivation(nn.ReLU(inplace=how == "in place"), 2.0), []
    if how == "forward hook":
        scaled.activation.register_forward_hook(lambda *of: seen.append(of[-1]))
    if how == "own forward":
        scaled.activation.forward = lambda x: seen.append(torch.relu(x)) or seen[0]  # type: ignore[method-assign]
    x = gaussian(2, 3, 4, 4)
    y = scaled(x)
    inner = x if how == "in place" else seen[0]
    assert torch.equal(inner, torch.relu(gaussian(2, 3, 4, 4)))
    assert torch.equal(y, 2 * inner)


@pytest.mark.parametrize("kind", [SWSConv2d, WSConv2d])
def test_an_evaluation_computes_a_weight_once(
    kind: type[SWSConv2d | WSConv2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x, count = kind(3, 4, 3).eval(), torch.randn(2, 3, 5, 5), []
    compute = conv.standardized_weight
    monkeypatch.setattr(conv, "standardized_weight", lambda: count.append(1) or compute())
    with torch.no_grad():
        y = conv(x)
        assert torch.equal(conv(x), y)
        assert len(count) == 1
        conv.weight.mul_(torch.linspace(1, 2, 27).view(3, 3, 3))
        assert not torch.equal(conv(x), y)
    assert len(count) == 2
