"""ANFR: its attentions are timm's, it stands in whole networks, and no strategy takes it for a normalization."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fednorm
from fednorm.cards import STRATEGIES
from fednorm.errors import RoleError
from fednorm.federation.plan import norm_plan
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.anfr import EfficientChannelAttention, SqueezeExcitation, kernel_size
from fednorm.norms.sws import SWSConv2d
from fednorm.roles import Kind, RoleRule

timm_layers = pytest.importorskip("timm.layers")


def maps(channels: int) -> torch.Tensor:
    return torch.randn(3, channels, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(channels))


@pytest.mark.parametrize("channels", [1, 2, 6, 16, 64, 300])
def test_eca_is_timms(channels: int) -> None:
    theirs = timm_layers.EcaModule(channels).double()
    ours = EfficientChannelAttention(channels, 1.0).double()
    assert kernel_size(channels) == theirs.conv.kernel_size[0]
    ours.weight.data = theirs.conv.weight.data
    torch.testing.assert_close(ours(maps(channels)), theirs(maps(channels)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("channels", [8, 48])
def test_se_is_timms(channels: int) -> None:
    theirs = timm_layers.SEModule(channels, rd_channels=max(1, channels // 16)).double()
    ours = SqueezeExcitation(channels, 2.0).double()
    for name, layer in (("down", theirs.fc1), ("up", theirs.fc2)):
        getattr(ours, f"{name}_weight").data = layer.weight.data[:, :, 0, 0]
        getattr(ours, f"{name}_bias").data = layer.bias.data
    torch.testing.assert_close(ours(maps(channels)), 2 * theirs(maps(channels)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gate", ["eca", "se"])
def test_a_network_has_an_attention_after_every_convolution_and_weights_alone(gate: str) -> None:
    kind = EfficientChannelAttention if gate == "eca" else SqueezeExcitation
    model = make_model("resnet18", make_norm("anfr", {"gate": gate}), num_classes=3, image_size=32, width=8)
    convolutions = [m for m in model.modules() if isinstance(m, SWSConv2d)]
    assert len([m for m in model.modules() if isinstance(m, kind)]) == len(convolutions) == 20
    kinds = {entry.kind for entry in norm_plan(model, RoleRule()).entries}
    assert kinds == {Kind.WEIGHT, Kind.GAIN}
    with pytest.raises(RoleError, match="silently be FedAvg"):
        STRATEGIES["fedbn"].make(model)


def test_the_signal_keeps_its_size_where_gates_begin_at_a_half() -> None:
    torch.manual_seed(0)
    norm = make_norm("anfr")
    layers = [m for _ in range(8) for m in (norm.conv(32, 32, 3, padding=1), norm.layer(32, 2), norm.activation())]
    out = nn.Sequential(*layers)(torch.randn(16, 32, 8, 8))
    assert 0.5 < float(out.detach().std()) < 2


def test_a_strangers_network_is_converted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    converted = fednorm.convert(model, "anfr", gate="se")
    assert isinstance(converted[0], SWSConv2d)  # type: ignore[index]
    assert isinstance(converted[1], SqueezeExcitation)  # type: ignore[index]
    assert torch.equal(converted[0].weight, model[0].weight)  # type: ignore[index, union-attr]
    converted(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
