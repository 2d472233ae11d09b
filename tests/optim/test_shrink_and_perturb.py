"""Shrink and perturb, against the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.shrink_and_perturb import shrink_and_perturb


def network(seed: int = 0, norm: str = "batch_norm", width: int = 4) -> nn.Module:
    return make_model("cnn", make_norm(norm), num_classes=3, image_size=4, width=width, seed=seed)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.double().clone() for key, value in model.state_dict().items()}


@settings(max_examples=8, deadline=None)
@given(shrink=st.floats(0, 1), perturb=st.floats(0, 1))
def test_weights_are_shrunk_and_fresh_ones_added(shrink: float, perturb: float) -> None:
    model, fresh = network(0).double(), network(1).double()
    model(torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    before, added, parameters = values(model), values(fresh), list(model.parameters())
    shrink_and_perturb(model, fresh, shrink=shrink, perturb=perturb)
    after = values(model)
    learned = {name for name, _ in model.named_parameters()}
    for key in before:
        expected = shrink * before[key] + perturb * added[key] if key in learned else before[key]
        torch.testing.assert_close(after[key], expected, rtol=1e-12, atol=1e-15)
    # The statistics had moved, so that keeping them is told from taking the fresh network's.
    assert not torch.equal(after["norm1.running_mean"], added["norm1.running_mean"])
    # The optimizer still knows these very parameters, and the fresh network is as it was.
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, added[key]) for key, value in values(fresh).items())


def test_parameters_that_are_not_trained_stay() -> None:
    model = network(0)
    model.get_submodule("conv1").requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # a shift of 0 would stay 0
    before = values(model)
    shrink_and_perturb(model, network(1), shrink=0.4, perturb=0.1)
    moved = {key for key, value in values(model).items() if not torch.equal(value, before[key])}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith("conv1.")}


def test_gradients_do_not_flow_and_the_noise_takes_the_weights_type() -> None:
    model = network(0).double()
    shrink_and_perturb(model, network(1), shrink=0.5, perturb=0.5)
    assert all(p.is_leaf and p.requires_grad and p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: shrink_and_perturb(m, network(1), shrink=1.1, perturb=0.1), r"shrink_and_perturb\.shrink .*1\.1"),
        (lambda m: shrink_and_perturb(m, network(1), shrink=-0.1, perturb=0.1), r"shrink .*\[0, 1\]; got -0\.1"),
        (lambda m: shrink_and_perturb(m, network(1), shrink=0.4, perturb=-1), r"perturb .*\[0, 1\]; got -1"),
        (lambda m: shrink_and_perturb(m, network(1, width=5), shrink=0.4, perturb=0.1), r"differ in .*conv1\.bias"),
        (
            lambda m: shrink_and_perturb(m, network(1, "none"), shrink=0.4, perturb=0.1),
            r"differ in norm1\.bias, .*\(10 of 22\)",
        ),
        (lambda m: shrink_and_perturb(m, m, shrink=0.4, perturb=0.1), "same module twice"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(call: Callable[[nn.Module], Any], words: str) -> None:
    model = network(0)
    before = values(model)
    with pytest.raises(ConfigError, match=words):
        call(model)
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())
