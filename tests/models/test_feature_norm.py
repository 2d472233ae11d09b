"""Features of one length before the head: the formula by hand, on any network, and what cannot have it is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fednorm
from fednorm.cards import MODELS
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.export import export
from fednorm.models import Order, build_model, chosen_model
from fednorm.norms import make_norm

SMALL = {
    "digits_cnn": 8,
    "alexnet": 63,
    "resnet18": 32,
    "mobilenet_v2": 32,
    "mlp": 4,
    "cnn": 16,
    "vit": 32,
    "spd_head": 8,
}


def built(name: str, norm: str = "none", *, feature_norm: bool, **more: Any) -> Any:
    order = Order(norm=make_norm(norm), num_classes=5, feature_norm=feature_norm, **more)
    return build_model(name, order, seed=3)


def test_the_logits_are_those_of_features_of_length_sqrt_d() -> None:
    model = built("mlp", feature_norm=True, image_size=2, width=6).model.double()
    w = model.state_dict()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = x.reshape(4, 12)
    for i in range(1, 5):
        h = torch.relu(h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"])
    f = math.sqrt(h.shape[1]) * h / h.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(model(x), f @ w["fc5.weight"].T + w["fc5.bias"], rtol=1e-12, atol=1e-12)


def test_features_of_length_zero_stay_zero_and_have_finite_gradients() -> None:
    model = built("mlp", feature_norm=True, image_size=2, width=6).model
    with torch.no_grad():
        model.fc4.weight.zero_()
        model.fc4.bias.fill_(-1)
    logits = model(torch.zeros(2, 3, 2, 2))
    assert torch.equal(logits, model.fc5.bias.expand(2, 5))
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.few(2)
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_model_of_ours_can_have_it_and_its_state_is_the_same(name: str) -> None:
    plain, normed = (built(name, "group_norm", feature_norm=on, image_size=SMALL[name]) for on in (False, True))
    state = plain.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in normed.model.state_dict().items())
    assert len(normed.notes) == len(plain.notes) + 1
    assert "sqrt(d)" in normed.notes[-1]
    seen: list[Tensor] = []
    head = next(m for m in reversed(list(normed.model.modules())) if isinstance(m, nn.Linear | nn.Conv2d))
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    normed.model.eval()(torch.rand(2, 3, SMALL[name], SMALL[name]))
    lengths = seen[0].square().sum(1).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, math.sqrt(seen[0].shape[1])))
    assert set(SMALL) == {n for n in MODELS.names if ":" not in n}


class ByConvolution(nn.Module):
    """A head that is a convolution, and is averaged over positions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).mean((2, 3))


def test_a_convolution_as_head_is_given_channels_of_one_length_at_each_position() -> None:
    model = built(MODELS.add(ByConvolution), feature_norm=True, image_size=8).model
    x = torch.rand(2, 3, 8, 8)
    h = functional.conv2d(x, model.body.weight, model.body.bias)
    f = h * math.sqrt(4) / h.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(x), functional.conv2d(f, model.head.weight, model.head.bias).mean((2, 3)))


class ByHand(nn.Module):
    """A head whose weight is used, and whose forward is never called."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.flatten(1), self.head.weight)


class HeadFirst(nn.Module):
    """A head that is not the last layer by module order."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(7, num_classes), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))


@pytest.mark.parametrize(
    ("network", "why"),
    [(ByHand, "is called 0 times.*feature_norm out"), (HeadFirst, "has 7 outputs.*feature_norm out")],
)
def test_a_network_whose_head_cannot_be_told_is_refused(network: type[nn.Module], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        built(MODELS.add(network), feature_norm=True, image_size=2)


def test_it_is_a_key_of_every_run_and_part_of_its_identity() -> None:
    plain, normed = (resolve({"model": {"name": "mlp", **more}}) for more in ({}, {"feature_norm": True}))
    assert "feature_norm" not in plain.model.to_dict()
    assert normed.model.to_dict()["feature_norm"] is True
    assert plain.hash != normed.hash == resolve(normed.to_dict()).hash
    assert plain.hash == resolve({"model": {"name": "mlp", "feature_norm": False}}).hash
    notes = chosen_model(normed.model, make_norm("none"), 5, 4, 0).notes
    assert any("sqrt(d)" in note for note in notes)
    with pytest.raises(ConfigError, match=r"model\.feature_norm must be true or false; got 1"):
        resolve({"model": {"feature_norm": 1}})


def test_an_exported_program_and_a_loaded_model_have_it_too(tmp_path: Path) -> None:
    small = {
        "data": {"train_per_client": 8, "test_per_domain": 4},
        "model": {"name": "mlp", "width": 4, "feature_norm": True},
    }
    run = fednorm.federated(rounds=1, config=small, runs=tmp_path)["run"]
    export(run, tmp_path / "model.pt2")
    images = torch.rand(3, 3, 32, 32)
    loaded = fednorm.load_model(run)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), loaded(images))
    plain = chosen_model(
        resolve({**small, "model": {"name": "mlp", "width": 4}}).model, make_norm("batch_norm"), 10, 32, 0
    ).model
    plain.load_state_dict(loaded.state_dict())  # the same tensors, and another function
    assert not torch.allclose(plain.eval()(images), loaded(images))
