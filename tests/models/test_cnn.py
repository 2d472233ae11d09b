"""NaP's convolutional network, against the formula written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednorm.errors import DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.spec import Norm


def test_four_convolutions_of_32_channels_and_256_features() -> None:
    model = make_model("cnn", Norm(), num_classes=10)
    convolutions = (3 * 9 + 1) * 32 + 3 * (32 * 9 + 1) * 32
    linear = (32 * 8 * 8 + 1) * 256 + (256 + 1) * 10
    assert sum(p.numel() for p in model.parameters()) == convolutions + linear == 555_754
    names = [name for name, _ in model.named_children()]
    assert names == [
        *("conv1", "norm1", "act1", "conv2", "norm2", "act2", "pool2"),
        *("conv3", "norm3", "act3", "conv4", "norm4", "act4", "pool4"),
        *("flatten", "fc1", "norm5", "act5", "fc2"),
    ]


def pooled(h: Tensor) -> Tensor:
    """2×2 maxima; a last odd row or column is pooled with nothing."""
    padded = F.pad(h, (0, h.shape[3] % 2, 0, h.shape[2] % 2), value=-math.inf)
    return padded.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))


@pytest.mark.parametrize("size", [8, 7])
def test_it_computes_the_network_with_a_norm_before_each_nonlinearity(size: int) -> None:
    model = make_model("cnn", make_norm("batch_norm"), num_classes=4, image_size=size, width=3).double()
    generator = torch.Generator().manual_seed(0)
    w = model.state_dict()
    for key, value in w.items():
        if key.startswith("norm") and key.endswith(("weight", "bias")):
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))

    def act(h: Tensor, i: int) -> Tensor:
        axes = [0, *range(2, h.ndim)]
        shape = [1, -1] + [1] * (h.ndim - 2)
        z = (h - h.mean(axes, keepdim=True)) / (h.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return (z * w[f"norm{i}.weight"].view(shape) + w[f"norm{i}.bias"].view(shape)).clamp_min(0)

    x = torch.randn(5, 3, size, size, generator=generator, dtype=torch.float64)
    h = x
    for i in (1, 2, 3, 4):
        h = act(F.conv2d(h, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1), i)
        h = pooled(h) if i in (2, 4) else h
    h = act(h.reshape(5, 3 * 4) @ w["fc1.weight"].T + w["fc1.bias"], 5)
    expected = h @ w["fc2.weight"].T + w["fc2.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 13), width=st.integers(1, 5), classes=st.integers(1, 5))
def test_it_takes_every_size_width_and_number_of_classes(size: int, width: int, classes: int) -> None:
    model = make_model("cnn", Norm(), num_classes=classes, image_size=size, width=width)
    features = model.get_submodule("fc1").weight.shape
    assert tuple(features) == (8 * width, width * math.ceil(math.ceil(size / 2) / 2) ** 2)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_other_images_are_refused() -> None:
    model = make_model("cnn", Norm(), num_classes=2, image_size=8, width=2)
    # 7×7 pixels would pool to the same 2×2 cells.
    with pytest.raises(DataError, match=r"cnn takes images of shape \(N, 3, 8, 8\); got \(2, 3, 7, 7\)"):
        model(torch.zeros(2, 3, 7, 7))
