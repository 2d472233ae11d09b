"""NaP's multilayer perceptron, against the formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fednorm.errors import DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.spec import Norm


def test_four_hidden_layers_of_512() -> None:
    model = make_model("mlp", Norm(), num_classes=10)
    hidden = (3 * 32 * 32 + 1) * 512 + 3 * (512 + 1) * 512
    assert sum(p.numel() for p in model.parameters()) == hidden + (512 + 1) * 10 == 2_366_474
    names = ["flatten", *(f"{kind}{i}" for i in (1, 2, 3, 4) for kind in ("fc", "norm", "act")), "fc5"]
    assert [name for name, _ in model.named_children()] == names


def test_it_computes_the_papers_network_with_a_norm_before_each_nonlinearity() -> None:
    model = make_model("mlp", make_norm("layer_norm"), num_classes=4, image_size=5, width=7).double()
    generator = torch.Generator().manual_seed(0)
    w = model.state_dict()
    for key, value in w.items():
        if key.startswith("norm"):
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64)
    h = x.reshape(6, 75)
    for i in (1, 2, 3, 4):
        z = h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"]
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        h = (z * w[f"norm{i}.weight"] + w[f"norm{i}.bias"]).clamp_min(0)
    expected = h @ w["fc5.weight"].T + w["fc5.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    last = x.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(model(last), model(x))


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 9), width=st.integers(1, 9), classes=st.integers(1, 5))
def test_it_takes_every_size_width_and_number_of_classes(size: int, width: int, classes: int) -> None:
    model = make_model("mlp", Norm(), num_classes=classes, image_size=size, width=width)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(width, 3 * size**2), *[(width, width)] * 3, (classes, width)]
    assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_other_images_are_refused() -> None:
    model = make_model("mlp", Norm(), num_classes=2, image_size=4, width=3)
    # As many numbers as (3, 4, 4), so that without the check the first layer would take them.
    with pytest.raises(DataError, match=r"mlp takes images of shape \(N, 3, 4, 4\); got \(2, 12, 2, 2\)"):
        model(torch.zeros(2, 12, 2, 2))
