"""Adaptive gradient clipping, against its formula written unit by unit and against timm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.norms.sws import SWSConv2d
from fednorm.optim import agc
from fednorm.optim.agc import AdaptiveGradientClipping, Units, clip_gradients, find_classifier

SHAPES = [(), (7,), (4, 5), (1, 5), (4, 1), (4, 2, 3), (4, 2, 3, 3), (1, 2, 3, 3), (4, 1, 1, 1), (1, 1, 1, 1)]


@pytest.fixture(params=[agc._SMALL, 0], ids=["one matrix", "each by itself"], autouse=True, scope="module")
def how(request: pytest.FixtureRequest) -> Iterator[None]:
    """Clip small tensors in one matrix, as they are, and like large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agc, "_SMALL", request.param)
        yield


def drawn(shape: tuple[int, ...], seed: int) -> nn.Parameter:
    """Draw a parameter with a gradient; rows of both differ in size by orders of magnitude, and some are 0."""
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> Tensor:
        value = torch.randn(shape, dtype=torch.float64, generator=generator)
        if value.ndim:
            sizes = torch.tensor([0.0, 2e-7, 1e-3, 1.0, 30.0], dtype=torch.float64)
            rows = sizes[torch.randint(5, (shape[0],), generator=generator)]
            value *= rows.view(-1, *[1] * (value.ndim - 1))
        return value

    parameter = nn.Parameter(tensor())
    parameter.grad = tensor()
    return parameter


def clipped_by_hand(parameter: nn.Parameter, clipping: float, eps: float, units: str) -> Tensor:
    """Clip with Python's own arithmetic, one unit at a time."""
    assert parameter.grad is not None
    counted = [size for size in parameter.shape if size != 1 or units == "timm"]
    rows = len(parameter) if len(counted) > 1 else 1
    weights = parameter.detach().reshape(rows, -1).tolist()
    gradients = parameter.grad.reshape(rows, -1).tolist()
    result = []
    for weight, gradient in zip(weights, gradients, strict=True):
        bound = clipping * max(math.sqrt(math.fsum(w * w for w in weight)), eps)
        norm = math.sqrt(math.fsum(g * g for g in gradient))
        factor = bound / max(norm, 1e-6) if norm > bound else 1.0
        result.append([g * factor for g in gradient])
    return torch.tensor(result, dtype=torch.float64).reshape(parameter.shape)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    clipping=st.sampled_from([1e-4, 0.01, 0.64, 2.0]),
    units=st.sampled_from(["deepmind", "timm"]),
    seed=st.integers(0, 2**31),
)
def test_clips_each_unit_as_the_formula_says(
    shapes: list[tuple[int, ...]], clipping: float, units: Units, seed: int
) -> None:
    parameters = [drawn(shape, seed + index) for index, shape in enumerate(shapes)]
    expected = [clipped_by_hand(parameter, clipping, 1e-3, units) for parameter in parameters]
    clip_gradients(parameters, clipping, units=units)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_timm_units_are_timms(shape: tuple[int, ...]) -> None:
    timm_agc = pytest.importorskip("timm.utils.agc")
    for seed in range(5):
        ours, theirs = drawn(shape, seed), drawn(shape, seed)
        clip_gradients([ours], 0.02, units="timm")
        timm_agc.adaptive_clip_grad(theirs, clip_factor=0.02, eps=1e-3)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-18)


def test_a_gain_is_one_unit_for_deepmind_and_many_for_timm() -> None:
    def clipped(units: Units) -> list[float]:
        gain = nn.Parameter(torch.ones(2, 1, 1, 1, dtype=torch.float64))
        gain.grad = torch.tensor([3.0, 0.004], dtype=torch.float64).view(2, 1, 1, 1)
        clip_gradients([gain], 0.01, units=units)
        return gain.grad.flatten().tolist()

    norm = math.hypot(3.0, 0.004)
    bound = 0.01 * math.sqrt(2)
    assert clipped("deepmind") == pytest.approx([3.0 * bound / norm, 0.004 * bound / norm], rel=1e-12)
    assert clipped("timm") == pytest.approx([0.01, 0.004], rel=1e-12)


def test_parameters_without_a_gradient_are_left_out() -> None:
    frozen = nn.Parameter(torch.ones(3, 3))
    clip_gradients([frozen], 0.01)
    assert frozen.grad is None
    clip_gradients([], 0.01)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def gradients_after_clipping(classifier: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = network()
    (100 * model(torch.randn(5, 3, 4, 4)).square().sum()).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    AdaptiveGradientClipping(model, 0.01, classifier=classifier)()
    return before, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("classifier", "spared"), [("", "5."), ("3", "3.")])
def test_the_classifier_and_nothing_else_is_spared(classifier: str, spared: str) -> None:
    before, after = gradients_after_clipping(classifier)
    for name, gradient in after.items():
        assert torch.equal(gradient, before[name]) == name.startswith(spared), name


def test_the_classifier_is_the_last_linear_layer_of_the_model_not_of_the_state() -> None:
    assert find_classifier(network()) == "5"


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Conv2d has no nn\.Linear.*Name it"):
        AdaptiveGradientClipping(nn.Conv2d(1, 1, 1), 0.01)
    with pytest.raises(ConfigError, match="no module 'head'"):
        AdaptiveGradientClipping(network(), 0.01, classifier="head")


@pytest.mark.parametrize("clipping", [0, -1.0, math.inf, "big"])
def test_a_bound_that_is_none_is_refused(clipping: float) -> None:
    with pytest.raises(ConfigError, match=r"agc\.clipping must be"):
        AdaptiveGradientClipping(network(), clipping)


def test_gradients_below_the_bound_stay_to_the_last_bit() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.rand(4, 4) * 1e-3
    before = parameter.grad.clone()
    clip_gradients([parameter], 0.01)
    assert torch.equal(parameter.grad, before)


@pytest.mark.parametrize(
    ("layers", "clipped"),
    [("all", {"0", "1", "3"}), ("convolutions", {"0"}), ("linear", {"3"})],
)
def test_it_may_act_on_one_type_of_layer(layers: Any, clipped: set[str]) -> None:
    """By the layer that owns a parameter: a gain belongs to its convolution, a scale to no layer of the two types."""
    model = nn.Sequential(
        SWSConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 2)
    )
    model(torch.zeros(2, 3, 5, 5))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    AdaptiveGradientClipping(model, 0.1, layers=layers)()
    changed = {key for key, p in model.named_parameters() if p.grad is not None and (p.grad != 100).any()}
    assert changed == {key for key, _ in model.named_parameters() if key.split(".")[0] in clipped}


def test_clipping_of_layers_that_there_are_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no linear but its classifier.*train\.agc_on"):
        AdaptiveGradientClipping(nn.Linear(3, 2), 0.1, layers="linear")
    with pytest.raises(ConfigError, match="layers"):
        AdaptiveGradientClipping(nn.Linear(3, 2), 0.1, layers="heads")  # type: ignore[arg-type]


@pytest.mark.parametrize("clipped", [0, 3, 64, 513, 1024])
@pytest.mark.parametrize("shape", [(1024, 300), (1024, 12, 5, 5)], ids=str)
def test_of_a_large_tensor_the_clipped_rows_alone_change(shape: tuple[int, ...], clipped: int) -> None:
    generator = torch.Generator().manual_seed(clipped)
    parameter = nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator) * 0.05
    if len(shape) == 4:
        parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
    rows = torch.randperm(shape[0], generator=generator)[:clipped]
    parameter.grad[rows] *= 100
    before = parameter.grad.clone()
    bound = 0.1 * parameter.detach().flatten(1).double().norm(dim=1)
    clip_gradients([parameter], 0.1)

    found = parameter.grad.flatten(1).double().norm(dim=1)
    kept = torch.ones(shape[0], dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(parameter.grad[kept], before[kept])
    torch.testing.assert_close(found[~kept], bound[~kept], rtol=1e-5, atol=0)
    shrunk = (bound / before.flatten(1).double().norm(dim=1))[~kept].float().view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(parameter.grad[~kept], before[~kept] * shrunk, rtol=1e-5, atol=0)


@pytest.mark.parametrize("worst", [math.nan, math.inf, 1e38], ids=str)
def test_a_gradient_that_diverged_leaves_nothing_behind(worst: float) -> None:
    """One clipping serves all clients of a run in turn: what one of them does is gone at the next."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2)).double()
    model = model.to(memory_format=torch.channels_last)
    clipping = AdaptiveGradientClipping(model, 0.1)
    for diverges in (False, True, False):
        expected = []
        for seed, parameter in enumerate(clipping.parameters):
            draw = torch.Generator().manual_seed(seed)
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=draw).to(
                memory_format=torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
            )
            if diverges:
                parameter.grad[(0,) * parameter.ndim] = worst
            expected.append(clipped_by_hand(parameter, 0.1, 1e-3, "deepmind"))  # type: ignore[arg-type]
        strides = [parameter.grad.stride() for parameter in clipping.parameters if parameter.grad is not None]
        clipping()
        for parameter, gradient, stride in zip(clipping.parameters, expected, strides, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.stride() == stride
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-18, equal_nan=True)


def test_it_follows_a_model_whose_type_changes_and_parameters_that_come_to_learn() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    clipping = AdaptiveGradientClipping(model, 0.1)
    for dtype, learning in ((torch.float32, 1), (torch.float32, 2), (torch.float64, 2)):
        model.to(dtype)
        parameters = clipping.parameters[: 2 * learning]
        for parameter in clipping.parameters:
            parameter.grad = torch.ones_like(parameter) if any(parameter is other for other in parameters) else None
        expected = [clipped_by_hand(parameter, 0.1, 1e-3, "deepmind") for parameter in parameters]  # type: ignore[arg-type]
        clipping()
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient.to(dtype))
