"""torchvision's and timm's classifiers by name, and weights to start from."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from fednorm.cards import MODELS
from fednorm.config import resolve
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.models import Order, build_model
from fednorm.norms import make_norm


def built(name: str, norm: str = "batch_norm", **asked: Any) -> Any:
    asked = {"num_classes": 7, "image_size": 32, **asked}
    return build_model(name, Order(norm=make_norm(norm), **asked), seed=3)


def theirs(name: str, num_classes: int, **options: Any) -> nn.Module:
    library, _, model = name.partition(":")
    made: nn.Module = (
        timm.create_model(model, num_classes=num_classes, **options)
        if library == "timm"
        else torchvision.models.get_model(model, num_classes=num_classes, **options)
    )
    return made


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:resnet10t"])
def test_with_batch_norm_it_is_the_librarys_own_function(name: str) -> None:
    model, twin = built(name).model, theirs(name, 7)
    twin.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for training in (True, False):
        logits = []
        for network in (model, twin):
            torch.manual_seed(0)  # of dropout
            logits.append(network.train(training)(images))
        assert torch.equal(*logits)
    assert MODELS[name].input_size == (176 if "10t" in name else 224)


@pytest.mark.slow
def test_it_is_converted_and_takes_the_constructors_arguments() -> None:
    result = built("timm:resnet10t", "group_norm", options={"stem_width": 8, "act_layer": "silu"})
    twin = theirs("timm:resnet10t", 7, stem_width=8)
    assert result.model.conv1[0].out_channels == twin.conv1[0].out_channels == 6  # type: ignore[union-attr, index]
    kinds = {type(m) for m in result.model.modules()}
    assert nn.GroupNorm in kinds
    assert nn.SiLU in kinds
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    assert "normalization layers replaced" in result.notes[0]


def test_a_constructors_argument_at_its_class_default_is_not_taken_for_unset() -> None:
    """resnet10t sets stem_width 32 itself; the class's default, 64, must reach it all the same."""
    config = resolve({"model": {"name": "timm:resnet10t", "stem_width": 64}})
    assert config.model.options == {"stem_width": 64}
    with pytest.raises(ConfigError, match=r"model.stem_width must be"):
        resolve({"model": {"name": "timm:resnet10t", "stem_width": "wide"}})
    with pytest.raises(ConfigError, match=r"no option 'stem_with'. Did you mean 'stem_width'"):
        resolve({"model": {"name": "timm:resnet10t", "stem_with": 64}})


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("timm:resnet26q", UnknownNameError, "timm has no classifier named 'resnet26q'. Did you mean timm:resnet26"),
        ("timm:resnet50.zz", UnknownNameError, "Did you mean timm:resnet50"),
        ("torchvision:resnet5", UnknownNameError, "Did you mean torchvision:resnet50"),
        ("torchvision:deeplabv3_resnet50", UnknownNameError, "torchvision has no classifier"),
        ("timm:", UnknownNameError, "timm has no classifier named ''"),
    ],
)
def test_unknown_names_come_with_the_nearest(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MODELS[name]


@pytest.mark.slow
def test_a_size_that_it_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot take images of shape \(2, 3, 8, 8\).*e.g. 224"):
        built("torchvision:alexnet", "none", image_size=8)
    with pytest.raises(ConfigError, match=r"raised .* when it was called with .*layers = "):
        built("torchvision:resnet18", options={"layers": [1, 1, 1, 1]})


# Weights --------------------------------------------------------------------------------------------------------------


def small(num_classes: int, *, hidden: int = 6) -> nn.Sequential:
    layers = {
        "conv1": nn.Conv2d(3, hidden, 3),
        "bn1": nn.BatchNorm2d(hidden),
        "act": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(hidden, 12),
        "fc": nn.Linear(12, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


SMALL = MODELS.add(small)


def saved(path: Path, num_classes: int, name: str = SMALL) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state: dict[str, torch.Tensor] = (small(num_classes) if name == SMALL else theirs(name, num_classes)).state_dict()
    for key, tensor in state.items():
        if "running" in key:
            tensor.uniform_(0.5, 2)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if path.stem == "nested" else state, path)
    return state


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "nested.pth"])
def test_weights_of_a_file_are_loaded_before_the_conversion(file: str, tmp_path: Path) -> None:
    state = saved(tmp_path / file, 7)
    result = built(SMALL, weights=str(tmp_path / file))
    own = result.model.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()[:12]
    assert result.notes[0] == f"The weights are those of {file} (sha256 {digest})."
    other = built(SMALL, "sws", weights=str(tmp_path / file)).model
    assert torch.equal(other.conv1.weight, state["conv1.weight"])


def test_a_head_for_other_classes_keeps_its_initial_weights_and_the_record_says_so(tmp_path: Path) -> None:
    state = saved(path := tmp_path / "w.safetensors", 1000)
    result, fresh = (
        built(SMALL, weights=str(path)),
        built(SMALL).model.state_dict(),
    )
    own = result.model.state_dict()
    assert torch.equal(own["fc.weight"], fresh["fc.weight"])
    assert torch.equal(own["fc.bias"], fresh["fc.bias"])
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items() if not key.startswith("fc."))
    assert "head was initialised anew" in result.notes[1]
    assert "fc.weight (1000, 12) → (7, 12)" in result.notes[1]


def test_weights_of_a_converted_network_are_taken_too(tmp_path: Path) -> None:
    first = built(SMALL, "group_norm").model
    torch.save({key: tensor + 1 for key, tensor in first.state_dict().items()}, tmp_path / "w.pt")
    again = built(SMALL, "group_norm", weights=str(tmp_path / "w.pt")).model.state_dict()
    assert all(torch.equal(again[key], tensor + 1) for key, tensor in first.state_dict().items())


def test_built_in_models_start_from_weights_too(tmp_path: Path) -> None:
    first = built("digits_cnn", width=4, image_size=8).model.state_dict()
    torch.save({key: tensor + 1 for key, tensor in first.items()}, tmp_path / "w.pt")
    again = built("digits_cnn", width=4, image_size=8, weights=str(tmp_path / "w.pt")).model.state_dict()
    assert all(torch.equal(again[key], tensor + 1) for key, tensor in first.items())


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    state = saved(path := tmp_path / "w.pt", 7)
    lacking = {key: tensor for key, tensor in state.items() if key != "fc1.weight"}
    misshaped = {**state, "conv1.weight": torch.zeros(6, 3, 7, 7)}
    broken = {**state, "conv1.weight": torch.full((6, 3, 3, 3), float("nan"))}
    torch.save(small(7, hidden=8).state_dict(), tmp_path / "wide.pt")
    for name, content, words in (
        ("lacking.pt", lacking, r"it lacks fc1.weight"),
        ("more.pt", {**state, "extra.weight": torch.zeros(1)}, "it has, and the model has not, extra.weight"),
        ("shape.pt", misshaped, r"conv1.weight of shape \(6, 3, 7, 7\) instead of \(6, 3, 3, 3\)"),
        ("nan.pt", broken, "not all finite numbers: conv1.weight"),
        ("list.pt", [1, 2], "holds no state dict"),
        ("code.pt", plain_module(), "cannot be read"),
        ("wide.pt", None, r"it has conv1.weight of shape \(8, 3, 3, 3\) instead of \(6, 3, 3, 3\), .*; |bn1"),
        ("cut.pt", path.read_bytes()[:1000], "cannot be read"),
        ("cut.safetensors", b"\x08\0\0\0", "cannot be read"),
        ("none.pt", None, "there is no such file"),
        ("w.onnx", b"", "takes a file that ends in"),
    ):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ConfigError, match=words):
            built(SMALL, weights=str(tmp_path / name))


def plain_module() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.mark.slow
def test_pretrained_comes_from_the_caches_and_from_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it went to the network"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("torchvision:shufflenet_v2_x0_5", "timm:resnet18.a1_in1k"):
        with pytest.raises(ConfigError, match=r"are not on this machine.*pretrained|weights='DEFAULT'"):
            built(name, weights="pretrained")
    with pytest.raises(ConfigError, match="has no published weights"):
        built("cnn", weights="pretrained")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    state = saved(tmp_path / "hub/checkpoints/shufflenetv2_x0.5-f707e7126e.pth", 1000, "torchvision:shufflenet_v2_x0_5")
    own = built("torchvision:shufflenet_v2_x0_5", weights="pretrained").model.state_dict()
    assert torch.equal(own["conv1.1.running_var"], state["conv1.1.running_var"])

    cached = tmp_path / "model.safetensors"
    state = saved(cached, 1000, "timm:resnet18")
    asked: list[tuple[str, str]] = []

    def from_cache(repository: str, name: str, revision: str | None = None) -> str | None:
        assert revision is None
        asked.append((repository, name))
        return str(cached) if name == cached.name else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", from_cache)
    own = built("timm:resnet18.a1_in1k", weights="pretrained").model.state_dict()
    assert torch.equal(own["layer4.1.bn2.running_var"], state["layer4.1.bn2.running_var"])
    assert asked[0] == ("timm/resnet18.a1_in1k", "model.safetensors")


def test_what_weights_hold_is_part_of_a_runs_identity_and_where_they_are_is_not(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt"]
    for path, value in zip(paths, (1.0, 1.0, 2.0), strict=True):
        torch.save({"w": torch.tensor(value)}, path)
    paths[1].write_bytes(paths[0].read_bytes())
    configs = [resolve({"model": {"weights": str(path)}}) for path in paths]
    hashes = [config.hash for config in configs]
    assert hashes[0] == hashes[1] != hashes[2]
    assert resolve({}).hash not in hashes
    document = configs[0].to_dict()
    assert resolve(document) == configs[0]
    paths[0].write_bytes(paths[2].read_bytes())
    with pytest.raises(ConfigError, match=r"The file of model.weights is not what it was"):
        resolve(document)


# All of them ----------------------------------------------------------------------------------------------------------


def takes_its_published_size(name: str) -> None:
    card = MODELS[name]
    order = Order(norm=make_norm("none"), num_classes=7, image_size=card.input_size)
    try:
        with torch.device("meta"):
            model = card.make(**card.arguments(order))  # type: ignore[call-arg]
    except NotImplementedError:  # it computes with what it makes, so it would have to be made in full
        assert issubclass(card.maker, nn.Module)  # type: ignore[arg-type]
        return
    images = torch.zeros(2, 3, card.input_size, card.input_size, device="meta")
    assert [model.train(training)(images).shape for training in (True, False)] == [(2, 7), (2, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_classifier_of_torchvision_is_found_and_takes_its_published_size(name: str) -> None:
    takes_its_published_size(f"torchvision:{name}")


FIRST = sorted({models[0] for module in timm.list_modules() if (models := timm.list_models(module=module))})


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_a_classifier_of_each_of_timms_families_is_found_and_takes_its_published_size(name: str) -> None:
    takes_its_published_size(f"timm:{name}")
