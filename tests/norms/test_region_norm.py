"""Region normalization (RN-L): the official code's arithmetic written out, empty regions, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from fednorm.conversion import convert
from fednorm.errors import DataError
from fednorm.norms import make_norm
from fednorm.norms.layer_norm import SampleLayerNorm
from fednorm.norms.region_norm import RegionNormLayer


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(spatial_dims: int = 2, **options: Any) -> RegionNormLayer:
    torch.manual_seed(3)
    layer = make_norm("region_norm", options).layer(5, spatial_dims).double()
    assert isinstance(layer, RegionNormLayer)
    return layer


def by_batch_norm(x: Tensor, mask: Tensor) -> Tensor:
    """A region as published: batch norm of the map, filled up with the region's mean, times the root of its share."""
    count = mask.sum() if mask.any() else torch.ones(())
    mean = (x * mask).sum((0, 2, 3), keepdim=True) / count
    filled = x * mask + (1 - mask) * mean
    share = count / (x.shape[0] * x.shape[2] * x.shape[3])
    return functional.batch_norm(filled, None, None, None, None, True, 0.0, 1e-5) * share.sqrt()


def published(x: Tensor, layer: RegionNormLayer) -> tuple[Tensor, Tensor]:
    seen = torch.cat((x.mean(1, keepdim=True), x.max(1, keepdim=True).values), 1)
    s = functional.conv2d(seen, layer.attention_weight, padding=3).sigmoid()
    mask = (s >= layer.threshold).double()
    normalized = by_batch_norm(x, mask) + by_batch_norm(x, 1 - mask)
    scale = functional.conv2d(s, layer.scale_weight, layer.scale_bias, padding=3)
    return normalized * (1 + scale) + functional.conv2d(s, layer.shift_weight, layer.shift_bias, padding=3), mask


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.55, 0.99, 1e-6])
def test_output_and_gradients_are_those_of_the_published_arithmetic(threshold: float) -> None:
    """With both regions, and with one of them empty."""
    layer = made(threshold=threshold)
    x, gy = 2 * gaussian(3, 5, 6, 7) + 0.3, gaussian(3, 5, 6, 7, seed=1)
    ours, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours)
    right, mask = published(other, layer)
    assert (0 < mask.mean() < 1) == (threshold not in (0.99, 1e-6))
    torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-11)
    y.backward(gy)
    gradients = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    right.backward(gy)
    torch.testing.assert_close(ours.grad, other.grad, rtol=1e-9, atol=1e-11)
    assert len(gradients) == 5
    for one, parameter in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.eval()(x), y)  # no running moments


def test_over_the_sample_it_is_the_published_one_of_each_sample_by_itself() -> None:
    whole, each = made(threshold=0.5), made(threshold=0.5, over="sample")
    x = gaussian(4, 5, 6, 6)
    torch.testing.assert_close(each(x), torch.cat([whole(x[n : n + 1]) for n in range(4)]), rtol=1e-10, atol=1e-11)
    assert not torch.allclose(whole(x), each(x))


def test_a_map_of_one_position_is_refused_with_the_module_and_a_remedy() -> None:
    with pytest.raises(DataError, match=r"RegionNormLayer meets a map of one position, shape \(3, 5, 1, 1\).*larger"):
        made()(gaussian(3, 5, 1, 1))
    model = convert(torchvision.models.resnet18(num_classes=3), "region_norm")
    with pytest.raises(DataError, match=r"RegionNormLayer 'layer4\.0\.bn1' meets.*or batch_norm or layer_norm"):
        model(torch.zeros(2, 3, 32, 32))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    with pytest.raises(DataError, match=r"expects an input \(N, 5, H, W\); got shape \(3, 4, 6, 6\)"):
        made()(gaussian(3, 4, 6, 6))


def test_lines_are_maps_of_one_row_and_features_have_layer_norm() -> None:
    x = gaussian(3, 5, 9)
    assert made(1)(x).shape == x.shape
    torch.testing.assert_close(made()(x), made()(x.unsqueeze(2)).squeeze(2))
    assert isinstance(make_norm("region_norm").layer(5, 0), SampleLayerNorm)
    features = gaussian(3, 5)
    torch.testing.assert_close(made()(features), nn.LayerNorm(5, elementwise_affine=False)(features))
