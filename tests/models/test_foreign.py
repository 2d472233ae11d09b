"""Strangers' networks: what they are given, what becomes of them, and what every mistake in them gets."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fednorm.cards import MODELS, source_digest
from fednorm.config import resolve
from fednorm.errors import ConfigError
from fednorm.federation.workbench import Workbench
from fednorm.models import Order, build_model, cnn
from fednorm.norms import make_norm
from fednorm.spec import Norm


def plain(num_classes: int, in_channels: int = 3, *, hidden: int = 6) -> nn.Module:
    """A convolution, batch-normalized."""
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden, 3),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(hidden, num_classes),
    )


class Net(nn.Module):
    def __init__(self, num_classes: int = 10, *, norm: Norm, image_size: int = 12, width: int = 4) -> None:
        super().__init__()
        self.stem = norm.conv(3, width, 3, padding=1, bias=False)
        self.norm = norm.layer(width, 2)
        self.act = norm.activation("relu")
        self.head = nn.Linear(width * image_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.norm(self.stem(images))).flatten(1))
        return logits


def built(method: Any, norm: str = "batch_norm", *, seed: int = 0, **asked: Any) -> Any:
    order = Order(norm=make_norm(norm), num_classes=asked.pop("num_classes", 7), **asked)
    return build_model(MODELS.add(method), order, seed=seed)


def test_a_network_with_batch_norm_stays_the_function_that_it_is() -> None:
    model = built(plain).model
    torch.manual_seed(0)
    twin = plain(7)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 9, 9)
    for training in (True, False):
        assert torch.equal(model.train(training)(images), twin.train(training)(images))


def test_a_network_that_was_not_built_from_the_norm_is_converted_and_the_record_says_so() -> None:
    result = built(plain, "sws")
    assert [type(m).__name__ for m in result.model][:3] == ["SWSConv2d", "Identity", "ScaledActivation"]
    assert result.notes[0] == (
        "Converted to ScaledWeightStandardization: 1 normalization layers replaced, 1 convolutions rebuilt, "
        "1 activations scaled."
    )
    assert result.conversion == {"layers": ["1"], "convolutions": ["0"], "activations": ["2"]}


def test_a_network_that_was_given_the_norm_is_taken_as_it_is() -> None:
    result = built(Net, "group_norm", image_size=10, width=8)
    assert (result.notes, result.conversion) == ((), {})
    assert isinstance(result.model.norm, nn.GroupNorm)
    assert result.model.head.weight.shape == (7, 800)
    card = MODELS[MODELS.add(Net)]
    assert (card.input_size, card.width, card.has_width, list(card.declared)) == (12, 4, True, [])
    assert built(Net).model.head.weight.shape == (7, 4 * 12**2)  # its own size and width


def test_it_is_given_what_its_signature_names_and_its_options() -> None:
    calls: list[dict[str, Any]] = []

    def spy(num_classes: int, width: int = 5, activation: str = "relu", *, in_channels: int, depth: int = 1) -> Any:
        calls.append({"classes": num_classes, "width": width, "act": activation, "in": in_channels, "depth": depth})
        return plain(num_classes)

    built(spy)
    built(spy, width=9, activation="Leaky-ReLU", options={"depth": 3})
    assert calls == [
        {"classes": 7, "width": 5, "act": "relu", "in": 3, "depth": 1},
        {"classes": 7, "width": 9, "act": "leaky_relu", "in": 3, "depth": 3},
    ]
    assert list(MODELS[MODELS.add(spy)].declared) == ["depth"]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), before=st.integers(0, 2**31))
def test_weights_depend_on_the_seed_alone_and_no_generator_notices(seed: int, before: int) -> None:
    def mixed(num_classes: int) -> nn.Module:
        network = plain(num_classes)
        with torch.no_grad():
            network[0].weight.add_(random.random() + np.random.rand())  # noqa: NPY002
        return network

    torch.manual_seed(before)
    np.random.seed(before)  # noqa: NPY002
    random.seed(before)
    states = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002
    first = built(mixed, "group_norm", seed=seed).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(before + 1)
    random.seed(before + 1)
    again = built(mixed, "group_norm", seed=seed).model.state_dict()
    other = built(mixed, "group_norm", seed=seed + 1).model.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_two_closures_are_two_models_and_one_object_is_one() -> None:
    def maker(hidden: int) -> Callable[..., nn.Module]:
        def net(num_classes: int) -> nn.Module:
            return plain(num_classes, hidden=hidden)

        return net

    four, five = maker(4), maker(5)
    references = [MODELS.add(four), MODELS.add(five)]
    assert len(set(references)) == 2
    assert [built(net).model[0].out_channels for net in (four, five, four)] == [4, 5, 4]
    assert MODELS.add(four) == references[0]
    assert built(functools.partial(plain, hidden=3)).model[0].out_channels == 3


def test_networks_that_need_a_real_batch_or_have_no_norm_are_taken() -> None:
    class Looks(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.fc = nn.Linear(48, num_classes)

        def forward(self, images: Tensor) -> Tensor:
            assert float(images.abs().max()) >= 0  # no meta tensor has numbers
            logits: Tensor = self.fc(images.flatten(1))
            return logits

    assert built(Looks, "none", image_size=4).notes == ("It has no normalization layer, and the norm puts none.",)

    def lazy(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes))

    model = built(lazy, image_size=6).model
    assert (model[3].in_features, int(model[1].num_batches_tracked), model.training) == (64, 0, True)


def raises(num_classes: int) -> nn.Module:
    raise RuntimeError(f"no such layer: {num_classes}")


def needs_16(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def eleven(num_classes: int) -> nn.Module:
    return plain(num_classes + 4)


class Auxiliary(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = plain(num_classes)

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (raises, "raises raised RuntimeError when it was called with num_classes = 7: no such layer: 7"),
        (lambda num_classes: num_classes, "returned a int.*returns a network"),
        (needs_16, r"cannot take images of shape \(2, 3, 32, 32\): RuntimeError.*Set data.image_size"),
        (eleven, r"returns shape \(2, 11\) for 2 images, and there are 7 classes.*last layer num_classes outputs"),
        (Auxiliary, "returns a tuple for 2 images in training"),
        (plain(7), r"is a network \(Sequential\).*Give its class, or a function"),
        (lambda classes: plain(classes), "takes no num_classes: its parameters are classes"),
        (lambda num_classes, depth: plain(num_classes, hidden=depth), "has depth without a default"),
        (
            lambda num_classes, *, width: plain(num_classes, hidden=width),
            r"takes a width and has no default. Set model.width",
        ),
        (dict, "which is no model. A model is a callable"),
        (5, "object:int is a int, which is no model"),
        (lambda num_classes: nn.Linear(3, num_classes).double(), "cannot take images"),
        (
            lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes)),
            "has no normalization layer that BatchNorm could replace",
        ),
    ],
)
def test_mistakes_are_explained(method: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        built(method)


def test_an_activation_or_a_width_that_nobody_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes no activation"):
        built(plain, activation="gelu")
    with pytest.raises(ConfigError, match="fixed width; got width = 4"):
        built(plain, width=4)


def test_an_object_of_another_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a Python object that was given as model in another process"):
        MODELS["object:somewhere.<locals>.net"]


def test_an_installed_package_offers_a_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_with_a_model.py").write_text(
        "from torch import nn\n\ndef tiny(num_classes, *, depth: int = 1):\n"
        "    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    about = tmp_path / "package_with_a_model-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: package-with-a-model\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fednorm.models]\nTiny-Net = package_with_a_model:tiny\n")
    monkeypatch.syspath_prepend(tmp_path)
    family = replace(MODELS)  # one that has not looked yet
    assert "tiny_net" in family.names
    card = family["Tiny_net"]
    assert list(card.declared) == ["depth"]
    assert (family.is_foreign("tiny-net"), family.is_foreign("Digits-CNN")) == (True, False)
    assert len(source_digest("tiny_net", card)) == 12


@pytest.mark.parametrize("width", [10**6, 2**63], ids=["36 terabytes", "more than can be numbered"])
def test_a_network_given_as_an_object_that_cannot_be_held_is_a_sentence(width: int) -> None:
    with pytest.raises(ConfigError, match=r"model cnn of width .* is larger than this machine can hold\. Lower model"):
        Workbench(resolve({"model": {"name": cnn.SPEC, "width": width}}))


def test_what_a_strangers_network_raises_else_is_not_called_large() -> None:
    def broken(num_classes: int) -> nn.Module:
        raise RuntimeError(f"no weights for {num_classes} classes")

    with pytest.raises(Exception, match="no weights for 10 classes") as raised:
        Workbench(resolve({"model": {"name": broken}}))
    assert "larger than this machine" not in str(raised.value)
