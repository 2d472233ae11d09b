"""What is peculiar to the activation normalizations, against PyTorch's and timm's layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fednorm.errors import ConfigError
from fednorm.norms import make_norm, spec_of


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaken(layer: nn.Module) -> nn.Module:
    for index, parameter in enumerate(layer.double().parameters()):
        parameter.data += gaussian(*parameter.shape, seed=index)
    return layer


def card_name(module: nn.Module) -> str | None:
    spec = spec_of(module)
    return spec.name if spec else None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.BatchNorm1d(4), "batch_norm"),
        (nn.BatchNorm3d(4), "batch_norm"),
        (nn.SyncBatchNorm(4), "batch_norm"),
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.InstanceNorm2d(4), "instance_norm"),
        (nn.Conv2d(4, 4, 3), None),
        (nn.Linear(4, 4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_pytorch_layers_are_known_by_type(module: nn.Module, name: str | None) -> None:
    assert card_name(module) == name


def test_descendants_of_other_libraries_are_known_by_their_ancestor() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    assert card_name(timm_layers.BatchNormAct2d(4)) == "batch_norm"
    assert card_name(timm_layers.LayerNorm2d(4)) == "layer_norm"
    assert card_name(timm_layers.GroupNormAct(4, num_groups=2)) == "group_norm"


def test_our_layer_norms_are_not_taken_for_group_norm() -> None:
    for over in ("sample", "channels"):
        for spatial_dims in (0, 2):
            assert card_name(make_norm("layer_norm", {"over": over}).layer(4, spatial_dims)) == "layer_norm"


def test_batch_norm_updates_running_moments_with_the_unbiased_variance() -> None:
    layer = make_norm("batch_norm", {"momentum": 0.25}).layer(3, 2).double()
    x = gaussian(4, 3, 5, 5)
    layer(x)
    state = layer.state_dict()
    torch.testing.assert_close(state["running_mean"], 0.25 * x.mean((0, 2, 3)))
    torch.testing.assert_close(state["running_var"], 0.75 + 0.25 * x.transpose(0, 1).flatten(1).var(1, correction=1))
    assert state["num_batches_tracked"] == 1


def test_layer_norm_over_channels_is_timms_layer_norm_2d() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    ours = shaken(make_norm("layer_norm", {"over": "channels", "eps": 1e-6}).layer(5, 2))
    theirs = timm_layers.LayerNorm2d(5, eps=1e-6).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(gaussian(2, 5, 3, 4)), theirs(gaussian(2, 5, 3, 4)))


@pytest.mark.parametrize("over", ["sample", "channels"])
def test_layer_norm_of_features_is_pytorchs(over: str) -> None:
    ours = shaken(make_norm("layer_norm", {"over": over}).layer(7, 0))
    theirs = nn.LayerNorm(7).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(gaussian(3, 7)), theirs(gaussian(3, 7)))


def test_layer_norm_over_channels_keeps_channels_last_maps_as_they_are() -> None:
    layer = make_norm("layer_norm", {"over": "channels"}).layer(5, 2).double()
    x = gaussian(2, 5, 3, 4).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_instance_norm_is_affine_unless_asked_otherwise() -> None:
    learned = dict(make_norm("instance_norm").layer(4, 2).named_parameters())
    assert {name: tuple(p.shape) for name, p in learned.items()} == {"weight": (4,), "bias": (4,)}
    assert not list(make_norm("instance_norm", {"affine": False}).layer(4, 2).parameters())


def test_instance_norm_of_features_is_layer_norm_and_not_zero() -> None:
    layer = make_norm("instance_norm").layer(6, 0).double()
    x = gaussian(3, 6)
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(x, (6,)))


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_four_spatial_axes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="0 to 3 spatial axes; got 4"):
        make_norm(name).layer(4, 4)


def test_ws_group_norm_undoes_the_growth_of_its_convolutions() -> None:
    norm = make_norm("ws_group_norm", {"num_groups": 4})
    torch.manual_seed(0)
    conv, layer = norm.conv(64, 64, 3, padding=1), norm.layer(64, 2)
    y = conv(torch.randn(8, 64, 8, 8))
    # Standardized weights have unit variance, so outputs have about the fan-in, 576 (less at the padded border).
    assert 400 < y.var().item() < 600
    assert layer(y).var().item() == pytest.approx(1, abs=0.01)


def test_timms_unscaled_layer_is_the_biased_variant() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.StdConv2d(4, 6, 3, eps=1e-6, padding=0).double()
    ours = make_norm("ws_group_norm", {"eps": 1e-6, "unbiased": False}).conv(4, 6, 3, bias=False).double()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(gaussian(2, 4, 5, 5)), theirs(gaussian(2, 4, 5, 5)), rtol=1e-10, atol=1e-12)
