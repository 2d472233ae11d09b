"""Weight clipping, entry by entry, with the fan-in of PyTorch's own initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.weight_clipping import WeightClipping
from fednorm.training.step import TrainingStep


def built(name: str, norm: str) -> nn.Module:
    return make_model(name, make_norm(norm), num_classes=3, image_size=8, width=4, seed=2)


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "norm"), [("mlp", "none"), ("cnn", "batch_norm"), ("resnet18", "group_norm")])
def test_each_entry_stays_within_kappa_times_its_layers_initial_bound(name: str, norm: str) -> None:
    model, kappa = built(name, norm), 1.5
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    WeightClipping(model, kappa)()
    bounds = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in, _ = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            bounds |= {f"{path}.{own}": kappa / math.sqrt(fan_in) for own in ("weight", "bias")}
    clipped = 0
    for key, parameter in model.named_parameters():
        if key not in bounds:  # a scale of 1 would be far outside
            assert torch.equal(parameter, before[key]), key
            continue
        for new, old in zip(parameter.flatten().tolist(), before[key].flatten().tolist(), strict=True):
            assert new == pytest.approx(min(max(old, -bounds[key]), bounds[key]), rel=1e-6)
            clipped += new != old
    assert clipped


def test_pytorchs_own_initial_weights_lie_within_kappa_1() -> None:
    model = built("mlp", "none")
    before = [p.detach().clone() for p in model.parameters()]
    WeightClipping(model, 1.0)()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_group_counts_its_own_inputs_and_frozen_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Linear(5, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 9.0)
    model[2].requires_grad_(False)
    WeightClipping(model, 2.0)()
    assert model[0].weight.flatten().tolist() == pytest.approx([2 / math.sqrt(18)] * 144)
    assert model[0].bias.tolist() == pytest.approx([2 / math.sqrt(18)] * 8)
    assert set(model[2].weight.flatten().tolist()) == {9.0}


def test_it_follows_the_update() -> None:
    model = built("mlp", "none")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e3)
    step = TrainingStep(model, optimizer, after=(WeightClipping(model, 1.0),))
    step(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3)
    assert all(float(m.weight.detach().abs().max()) <= 1 / math.sqrt(m.in_features) + 1e-7
               for m in model.modules() if isinstance(m, nn.Linear))  # fmt: skip


@pytest.mark.parametrize(
    ("model", "kappa", "words"),
    [
        (nn.Linear(2, 2), 0, r"train\.weight_clip must be greater than 0; got 0"),
        (nn.Linear(2, 2), "x", r"train\.weight_clip must be a finite number"),
        (nn.ReLU(), 1.0, "linear layers and convolutions, and ReLU has none"),
    ],
)
def test_what_does_not_fit_is_refused(model: nn.Module, kappa: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WeightClipping(model, kappa)
