"""L2 toward zero of scales, against autograd of the term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.optim.l2_scales import L2Scales


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "rms_norm", "adab2n"])
def test_it_adds_the_gradient_of_the_term_to_the_scales_alone(norm: str) -> None:
    model = make_model("cnn", make_norm(norm), num_classes=3, image_size=8, width=4, seed=2)
    torch.manual_seed(0)
    scales = {}
    for path, layer in model.named_modules():
        if path.rpartition(".")[2].startswith("norm"):
            scales[f"{path}.weight"] = layer.weight
            with torch.no_grad():
                layer.weight.add_(torch.randn_like(layer.weight))  # type: ignore[arg-type,operator]
    assert scales
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    L2Scales(model, 0.3)()
    term = 0.3 * sum(scale.square().sum() for scale in scales.values())  # type: ignore[operator]
    pulls = dict(zip(scales, torch.autograd.grad(term, list(scales.values())), strict=True))
    for key, parameter in model.named_parameters():
        expected = before[key] + pulls[key] if key in pulls else before[key]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-7, msg=key)


def test_it_is_the_whole_gradient_where_the_loss_gives_none_and_frozen_scales_have_none() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[2].requires_grad_(False)
    L2Scales(model, 0.5)()
    assert model[0].weight.grad.tolist() == [1.0, 1.0]
    assert model[0].bias.grad is model[1].weight.grad is model[2].weight.grad is None


@pytest.mark.parametrize(
    ("norm", "strength", "words"),
    [
        ("none", 0.1, r"train\.l2_scales pulls the scales of normalization layers to 0, and .* has none"),
        ("batch_norm", 0.0, r"train\.l2_scales must be greater than 0; got 0"),
    ],
)
def test_what_does_not_fit_is_refused(norm: str, strength: Any, words: str) -> None:
    model = make_model("mlp", make_norm(norm), num_classes=3, image_size=8, width=4, seed=2)
    with pytest.raises(ConfigError, match=words):
        L2Scales(model, strength)
