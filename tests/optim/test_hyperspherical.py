"""SimbaV2's projection, against torch.nn.functional.normalize along a weight's inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.hyperspherical import Hyperspherical


def built(name: str, norm: str) -> nn.Module:
    return make_model(name, make_norm(norm), num_classes=3, image_size=8, width=4, seed=2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("name", "norm"), [("mlp", "none"), ("cnn", "batch_norm"), ("resnet18", "group_norm")])
def test_every_hidden_row_has_length_1_and_its_direction(name: str, norm: str, layout: torch.memory_format) -> None:
    model = built(name, norm).to(memory_format=layout)  # type: ignore[call-overload]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    Hyperspherical(model)()
    layers = [path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    head = next(path for path in layers if model.get_submodule(path).weight.shape[0] == 3)  # type: ignore[index,union-attr]
    hidden = {f"{path}.weight" for path in layers if path != head}
    assert hidden
    for key, parameter in model.named_parameters():
        if key in hidden:
            expected = functional.normalize(before[key].double().flatten(1), dim=1).view_as(parameter)
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(parameter, before[key]), key


def test_before_moments_a_channel_the_function_stays() -> None:
    def norm() -> nn.Module:
        return nn.InstanceNorm2d(4, eps=0.0)  # beside a variance, eps is what the length matters to

    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(first, norm(), nn.ReLU(), second, norm(), nn.Flatten(), nn.Linear(64, 2)).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model(images)
    weights = [p.detach().clone() for p in model.parameters()]
    Hyperspherical(model)()
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
    torch.testing.assert_close(model(images), before)


def test_a_row_of_zeros_stays_and_frozen_weights_do() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
    model[2].requires_grad_(False)
    frozen = model[2].weight.clone()
    Hyperspherical(model)()
    assert float(model[0].weight[0].detach().norm()) == pytest.approx(1.0)
    assert model[0].weight[1].tolist() == [0, 0, 0]
    assert torch.equal(model[2].weight, frozen)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2)])
def test_a_network_without_a_hidden_layer_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"train\.hyperspherical projects the weights of hidden layers.*has none"):
        Hyperspherical(model)


@pytest.mark.parametrize("changes", [{"train": {"project": True, "hyperspherical": True}},
                                     {"norm": {"name": "nap"}, "train": {"hyperspherical": True}}])  # fmt: skip
def test_two_projections_are_refused(changes: Any) -> None:
    from fednorm.config import resolve
    from fednorm.training.trainee import Trainee

    config = resolve({"model": {"name": "cnn", "width": 4}, **changes})
    with pytest.raises(ConfigError, match="one undoes the other"):
        Trainee(config, config.norm.card.made(config.norm.options), num_classes=3, image_size=8)
