"""Scales that begin as U(0, 1): which tensors are drawn, which are left, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federation.simulate import simulate
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.training.scale_init import draw_scales
from fednorm.training.trainee import Trainee


def network(norm: str, seed: int = 3) -> nn.Module:
    return make_model("digits_cnn", make_norm(norm), num_classes=5, width=8, seed=seed)


def trainee(**train: Any) -> Trainee:
    config = resolve({"train": train, "norm": {"name": "batch_norm"}, "model": {"width": 8}}, only="federated")
    return Trainee(config, make_norm("batch_norm"), num_classes=5, image_size=28)


def test_scales_are_uniform_and_all_else_stays() -> None:
    model = network("batch_norm")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    draw_scales(model, 3)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    scales = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert moved == scales
    drawn = torch.cat([model.state_dict()[key] for key in sorted(scales)]).double()
    # n draws of U(0, 1): the mean is 1/2 and the variance 1/12, each within four of its standard errors.
    n = len(drawn)
    assert 0 <= drawn.min() < 0.05
    assert 0.95 < drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(1 / 2, abs=4 * (1 / 12 / n) ** 0.5)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=4 * (1 / 180 / n) ** 0.5)


def test_a_seed_gives_its_scales_again_and_layers_have_their_own() -> None:
    first, again, other = network("batch_norm"), network("batch_norm"), network("batch_norm")
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        draw_scales(model, seed)
    drawn = [[p for key, p in model.named_parameters() if key.startswith("bn")] for model in (first, again, other)]
    assert all(map(torch.equal, drawn[0], drawn[1]))
    weights = [p for model in (first, other) for p in model.parameters() if p.ndim == 1 and 0 < p.min() < p.max() < 1]
    assert len({tuple(weight[:8].tolist()) for weight in weights}) == len(weights) > 2


def test_a_scale_that_begins_elsewhere_is_its_methods() -> None:
    """dyt's steepness begins at 0.5; region_norm's scales of maps are added to 1, and begin near 0."""
    model = network("dyt")
    alphas = {key: p.clone() for key, p in model.named_parameters() if key.endswith("alpha")}
    draw_scales(model, 3)
    assert alphas
    assert all(torch.equal(dict(model.named_parameters())[key], alpha) for key, alpha in alphas.items())
    regions = network("region_norm")
    before = {key: p.clone() for key, p in regions.named_parameters() if "scale_" in key}
    draw_scales(regions, 3)
    assert before
    assert all(torch.equal(dict(regions.named_parameters())[key], scale) for key, scale in before.items())
    with pytest.raises(ConfigError, match=r"none that begin at 1\. Take a norm that has them, such as batch_norm"):
        draw_scales(network("none"), 3)


def test_a_run_begins_with_them_and_the_default_with_ones() -> None:
    own, drawn = trainee().model, trainee(scale_init="uniform").model
    pairs = zip(own.named_parameters(), drawn.named_parameters(), strict=True)
    other = {key for (key, a), (_, b) in pairs if not torch.equal(a, b)}
    assert other == {key for key, p in own.named_parameters() if p.ndim == 1 and bool((p == 1).all())}
    expected = make_model("digits_cnn", make_norm("batch_norm"), num_classes=5, width=8, seed=1)
    draw_scales(expected, 1)
    assert all(map(torch.equal, expected.parameters(), drawn.parameters()))


def test_weights_of_a_file_have_no_initial_scales(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(make_model("digits_cnn", make_norm("batch_norm"), num_classes=5, seed=1).state_dict(), file)
    config = resolve({"train": {"scale_init": "uniform"}, "model": {"weights": str(file)}}, only="federated")
    with pytest.raises(ConfigError, match=r"model\.weights brings a trained network's\. Leave one of the two out"):
        Trainee(config, make_norm("batch_norm"), num_classes=5, image_size=28)


def test_the_key_leaves_other_runs_their_names_and_trains() -> None:
    plain = resolve({"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}, only="federated")
    values: dict[str, Any] = {
        "data": {"train_per_client": 8, "test_per_domain": 4},
        "model": {"width": 4},
        "train": {"trainable": "norm", "scale_init": "uniform"},
        "rounds": {"num_rounds": 1},
    }
    assert plain.hash == resolve({**plain.to_dict(), "train": {"scale_init": "own"}}, only="federated").hash
    results = [simulate(resolve(values, only="federated"), runs=None) for _ in range(2)]
    assert results[0]["final"] == results[1]["final"]
    values["train"] = {"trainable": "norm"}
    assert resolve(values, only="federated").hash != results[0]["hash"]
    assert simulate(resolve(values, only="federated"), runs=None)["rounds"] != results[0]["rounds"]
