"""One contract over the whole registry of norms, on drawn shapes; a new norm is found by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.cards import NORMS
from fednorm.errors import ConfigError
from fednorm.norm_contract import CHECKS, Case, check_network, check_program
from fednorm.recognition.tensor_kinds import declare_tensors, forget_tensors
from fednorm.spec import Norm, NormSpec

SHAPES = st.one_of(
    st.tuples(st.integers(2, 4), st.sampled_from((8, 16)), st.integers(2, 4), st.integers(2, 5)),
    st.tuples(st.integers(2, 4), st.sampled_from((8, 16)), st.integers(2, 6)),
    st.tuples(st.integers(3, 6), st.sampled_from((8, 16))),
)
"""(N, C, H, W), (N, C, L) and (N, C)."""

FIXED = ((3, 8, 3, 4), (3, 8, 5), (5, 8))


def case_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Case:
    return Case(NORMS[name], NORMS[name].made(), shape, seed)


def takes(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a norm takes such inputs: one for tokens alone refuses maps, in words."""
    try:
        case_of(name, shape).unit()
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", NORMS.names)
def test_every_norm_takes_some_inputs(name: str) -> None:
    assert any(takes(name, shape) for shape in FIXED)


@pytest.mark.parametrize("name", NORMS.names)
def test_every_norm_keeps_the_contract(name: str) -> None:
    """On one shape that it takes; the slow tier draws many."""
    fitting = [shape for shape in FIXED if takes(name, shape)]
    for number, check in enumerate(CHECKS.values()):
        check(case_of(name, fitting[number % len(fitting)], number))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NORMS.names)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(shape=SHAPES, seed=st.integers(0, 2**16))
def test_every_norm_keeps_the_contract_on_many_shapes(name: str, check: str, shape: tuple[int, ...], seed: int) -> None:
    assume(takes(name, shape))
    CHECKS[check](case_of(name, shape, seed))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch's, as it traces
@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("shape", FIXED, ids=["maps", "sequences", "features"])
@pytest.mark.parametrize("name", NORMS.names)
def test_programs_can_be_made_of_every_norm(name: str, shape: tuple[int, ...], how: str) -> None:
    if takes(name, shape):
        check_program(case_of(name, shape), how)


ELSEWHERE = [name for name in NORMS.names if getattr(NORMS[name], "tried_on", "digits_cnn") != "digits_cnn"]
"""Norms that act on what a plain network has not: attention, residual branches."""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in (*ELSEWHERE, "batch_norm") else pytest.mark.slow) for name in NORMS.names],
)
def test_every_norm_keeps_the_contract_in_a_network(name: str) -> None:
    check_network(NORMS[name])


# A broken norm is seen -----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Normalizes each sample; the broken ones below differ in one thing."""

    def __init__(self, channels: int, broken: str) -> None:
        super().__init__()
        self.broken = broken
        self.weight = nn.Parameter(torch.ones(channels))
        self.passes = 0
        self.register_buffer("memory", torch.zeros(()), persistent=broken != "forgets")

    def forward(self, x: Tensor) -> Tensor:
        axes = tuple(range(0 if self.broken == "couples" else 1, x.ndim))
        size = x.square().mean(axes, keepdim=True).add(1e-5).sqrt()
        y = x / (size.detach() if self.broken == "detaches" and self.training else size)
        y = y * self.weight.view(1, -1, *[1] * (x.ndim - 2))
        if self.broken == "forgets" and self.training:
            y = y + self.memory
            self.memory = self.memory + 1
        if self.broken == "counts":
            self.passes += 1
            y = y + self.passes
        if self.broken == "modes" and not self.training:
            y = 2 * y
        if self.broken == "contiguous":
            y = y.contiguous()
        if self.broken == "infinite":
            y = y + torch.tensor(float("nan"))
        if self.broken == "halves":
            return y.half()
        if self.broken == "cuts":
            return y.detach() * 0 + self.weight.view(1, -1, *[1] * (x.ndim - 2))
        return y.half().to(y.dtype) * float("inf") if self.broken == "overflows" and x.dtype == torch.bfloat16 else y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Norm):
    broken: str = ""

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        del spatial_dims
        return Layer(num_channels, self.broken)


def broken_case(broken: str, **facts: Any) -> Case:
    card = NormSpec(name="broken", summary="Broken.", make=Broken, tensors={}, layers=(Layer,), **facts)
    return Case(card, Broken(broken=broken), (3, 8, 3, 4))


@pytest.fixture(autouse=True, scope="module")
def _declared() -> Iterator[None]:
    declare_tensors(Layer, weight="scale", memory="mean")
    yield
    forget_tensors(Layer)


@pytest.mark.parametrize("check", CHECKS)
def test_a_norm_of_ones_own_keeps_the_contract(check: str) -> None:
    CHECKS[check](broken_case(""))


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        ("detaches", "gradient", "set exact_backward=False"),
        ("couples", "one sample", "depends on the others in its batch"),
        ("counts", "modes", "evaluation changes with its repetition"),
        ("modes", "modes", "set train_eval_differ=True"),
        ("forgets", "resume", "ends with another"),
        ("forgets", "round trip", "after a state dict the layer computes something else in training"),
        ("contiguous", "layout", "outputs of another layout"),
        ("infinite", "forward", "not finite"),
        ("halves", "forward", r"torch\.float64 becomes torch\.float16"),
        ("cuts", "forward", "does not depend on the input"),
        ("overflows", "autocast", "not finite under autocast"),
    ],
)
def test_a_broken_norm_is_seen(broken: str, check: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        CHECKS[check](broken_case(broken))


class Remembering(nn.GroupNorm):
    """Group normalization that owns a buffer of which its card, group_norm's, knows nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)
        self.register_buffer("extra", torch.zeros(channels))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undeclared(Norm):
    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        del spatial_dims
        return Remembering(num_channels)


def test_a_tensor_that_is_not_declared_is_seen() -> None:
    with pytest.raises(AssertionError, match="the card does not declare 'extra' in its tensors"):
        CHECKS["roles"](Case(NORMS["group_norm"], Undeclared(), (3, 8, 3, 4)))


@pytest.mark.slow
def test_facts_that_are_not_so_are_seen() -> None:
    with pytest.raises(AssertionError, match="set exact_backward=True"):
        CHECKS["gradient"](broken_case("", exact_backward=False))
    with pytest.raises(AssertionError, match="set batch_coupled=False"):
        CHECKS["one sample"](broken_case("", batch_coupled=True))
    CHECKS["gradient"](broken_case("detaches", exact_backward=False))
