"""The projection: which weights are hidden, what every update does to them and to scale and shift, how it resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fednorm.errors import ConfigError
from fednorm.models import make_model
from fednorm.norms import make_norm, spec_of
from fednorm.optim.hidden import hidden_layers, in_order
from fednorm.optim.projection import WeightProjection
from fednorm.roles import Kind
from fednorm.training.step import TrainingStep

SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"width": 16, "image_size": 8},
    "cnn": {"width": 4, "image_size": 8},
    "resnet18": {"width": 4, "image_size": 8},
}
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1.0),
}


def network(name: str = "mlp", norm: str = "nap", **options: Any) -> Any:
    return make_model(name, make_norm(norm, options), num_classes=3, **SIZES[name])


def batches(count: int, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(6, 3, size, size, generator=draw), torch.randint(3, (6,), generator=draw)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], None], steps: int = 4) -> None:
    step = TrainingStep(model, optimizer, after=[after])
    for images, labels in batches(steps):
        step(images, labels, tasks=torch.arange(6) % 2, num_tasks=2)


def weights_but_the_last(model: nn.Module) -> dict[str, Tensor]:
    """Return every weight of a linear layer or convolution but the classifier's: what must be projected here."""
    found = {p: m.weight for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found.pop([path for path, m in model.named_modules() if isinstance(m, nn.Linear)][-1])
    return found


def shake(model: nn.Module) -> Any:
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


def norm_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if (spec := spec_of(m)) is not None and spec.normalizes]


# Training.


@pytest.mark.few(5)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", ["nap", "batch_norm", "adab2n"])
@pytest.mark.parametrize("name", SIZES)
def test_hidden_weights_keep_their_initial_norm_under_every_optimizer_and_the_output_layer_is_free(
    name: str, norm: str, optimizer: str
) -> None:
    model = network(name, norm)
    free = copy.deepcopy(model)
    initial = {path: weight.detach().norm().item() for path, weight in weights_but_the_last(model).items()}
    projection = WeightProjection(model)
    assert projection.radii == pytest.approx(initial, rel=1e-6)
    train(model, OPTIMIZERS[optimizer](model.parameters()), projection)
    train(free, OPTIMIZERS[optimizer](free.parameters()), lambda: None)
    unprojected = weights_but_the_last(free)
    for path, weight in weights_but_the_last(model).items():
        assert weight.detach().norm().item() == pytest.approx(initial[path], rel=2e-6)
    moved = [weight.detach().norm().item() / initial[path] - 1 for path, weight in unprojected.items()]
    assert max(map(abs, moved)) > 1e-3
    assert output_norm(model) != pytest.approx(output_norm(network(name, norm)), rel=1e-5)


def output_norm(model: nn.Module) -> float:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight.detach().norm().item()


@pytest.mark.parametrize("affine", ["decay", "joint", "free"])
@pytest.mark.parametrize("norm", ["nap", "batch_norm"])
def test_training_is_that_of_a_loop_written_by_hand(norm: str, affine: str) -> None:
    """Float64, a convolution and two linear layers, written out; Adam, whose state must not notice."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), make_norm(norm).layer(4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 5, bias=False), make_norm(norm).layer(5, 0), nn.LeakyReLU(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    byhand = copy.deepcopy(model)
    projection = WeightProjection(model, affine=affine, decay=0.9)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (model, byhand)]
    radii = {0: byhand[0].weight.norm().item(), 4: byhand[4].weight.norm().item()}
    for images, labels in batches(12):
        for each, optimizer in zip((model, byhand), optimizers, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(each(images.double()), labels).backward()
            optimizer.step()
        projection()
        for index, radius in radii.items():
            weight = byhand[index].weight.data
            weight.copy_(radius * weight / math.sqrt(sum(value**2 for value in weight.flatten().tolist())))
        for index in (1, 5):
            scale, shift = byhand[index].weight.data, byhand[index].bias.data
            if affine == "decay":
                scale.copy_(0.9 * scale + 0.1 * 1)
                shift.copy_(0.9 * shift)
            elif affine == "joint":
                length = math.sqrt(scale.square().sum() + shift.square().sum())
                scale.copy_(math.sqrt(len(scale)) * scale / length)
                shift.copy_(math.sqrt(len(scale)) * shift / length)
    for ours, theirs in zip(model.state_dict().values(), byhand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_each_layer_is_projected_as_a_whole_and_not_each_neuron() -> None:
    model = network("mlp")
    before = [hidden.layer.weight.detach().norm(dim=1) for hidden in hidden_layers(model)]
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), WeightProjection(model))
    for hidden, rows in zip(hidden_layers(model), before, strict=True):
        assert (hidden.layer.weight.detach().norm(dim=1) / rows - 1).abs().max() > 0.01


@settings(deadline=None, max_examples=20)
@given(every=st.integers(1, 5), updates=st.integers(0, 11))
def test_it_projects_after_every_so_many_updates(every: int, updates: int) -> None:
    model = network("mlp")
    projection = WeightProjection(model, every=every, affine="free")
    weight = model.fc1.weight.data
    since = 0
    for _ in range(updates):
        weight *= 2.0
        projection()
        since = 0 if projection.updates % every == 0 else since + 1
        assert weight.norm().item() == pytest.approx(2**since * projection.radii["fc1"], rel=1e-5)
    assert projection.updates == updates
    assert since == updates % every


# What it does not change.


@pytest.mark.parametrize("norm", ["nap", "batch_norm", "adab2n"])
@pytest.mark.parametrize("name", SIZES)
def test_projecting_weights_does_not_change_what_the_network_computes(name: str, norm: str) -> None:
    model = network(name, norm, eps=1e-12).double()
    projection = WeightProjection(model, affine="free")
    shake(model)
    images = next(batches(1))[0].double()
    before = model(images)
    weight = next(iter(weights_but_the_last(model).values())).clone()
    projection()
    assert not torch.allclose(next(iter(weights_but_the_last(model).values())), weight)
    torch.testing.assert_close(model(images), before, rtol=1e-6, atol=1e-7)


def test_jointly_scaled_layers_pass_a_factor_to_the_output_layer_and_nothing_else() -> None:
    """Every norm but the last feeds a normalized layer through a ReLU; the last one's factor reaches the logits."""
    model = network("mlp", eps=1e-12).double()
    projection = WeightProjection(model, affine="joint")
    shake(model)
    images = next(batches(1))[0].double()
    before = model(images) - model.fc5.bias
    last = torch.cat([model.norm4.weight, model.norm4.bias]).norm()
    projection()
    factor = math.sqrt(16) / last.item()
    assert abs(factor - 1) > 0.01
    torch.testing.assert_close(model(images) - model.fc5.bias, factor * before, rtol=1e-6, atol=1e-8)


# Scale and shift.


def test_scales_without_shift_keep_their_own_length() -> None:
    model = network("mlp", offset=False)
    projection = WeightProjection(model, affine="joint")
    shake(model)
    expected = [4.0 * layer.weight / layer.weight.norm() for layer in norm_layers(model)]
    projection()
    for layer, wanted in zip(norm_layers(model), expected, strict=True):
        torch.testing.assert_close(layer.weight, wanted)


@pytest.mark.parametrize(("decay", "kept"), [(1.0, 1.0), (0.25, 0.25), (0.0, 0.0)])
def test_scales_decay_to_one_and_shifts_to_zero(decay: float, kept: float) -> None:
    model = shake(network("resnet18", "adab2n"))
    old = copy.deepcopy(norm_layers(model))
    psi = [layer.task_weight.clone() for layer in norm_layers(model)]
    WeightProjection(model, decay=decay)()
    for layer, before, gates in zip(norm_layers(model), old, psi, strict=True):
        torch.testing.assert_close(layer.weight, kept * before.weight + (1 - kept))
        torch.testing.assert_close(layer.bias, kept * before.bias)
        assert torch.equal(layer.task_weight, gates), "task weights are none of its business"


def test_joint_leaves_to_decay_what_goes_into_a_residual_sum() -> None:
    model = network("resnet18")
    projection = WeightProjection(model, affine="joint", decay=0.5)
    shake(model)
    old = copy.deepcopy(model)
    projection()
    into_a_sum = 0
    for path, layer in model.named_modules():
        spec = spec_of(layer)
        if spec is None:
            continue
        before = old.get_submodule(path)
        if path.endswith("norm2") or "downsample" in path:
            into_a_sum += 1
            torch.testing.assert_close(layer.weight, 0.5 * before.weight + 0.5)
        else:
            assert torch.cat([layer.weight, layer.bias]).norm().item() == pytest.approx(len(layer.weight) ** 0.5)
    assert into_a_sum == 8 + 3


def test_zeros_have_no_direction_and_stay() -> None:
    """torchvision's zero_init_residual, and a scale that training has brought to 0."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    projection = WeightProjection(model, affine="joint")
    for parameter in (*model[1].parameters(), model[0].weight):
        nn.init.zeros_(parameter)
    projection()
    for parameter in (*model[1].parameters(), model[0].weight):
        assert torch.equal(parameter, torch.zeros_like(parameter))


def test_a_shift_without_a_scale_decays_even_under_joint() -> None:
    layer = nn.LayerNorm(4)
    layer.register_parameter("weight", None)
    nn.init.constant_(layer.bias, 3.0)
    WeightProjection(nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU()), affine="joint", decay=0.5)()
    assert torch.equal(layer.bias.detach(), torch.full((4,), 1.5))


@pytest.mark.parametrize(
    ("activation", "legal"),
    [
        (nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.PReLU(), True), (nn.Identity(), True), (nn.ReLU6(), False),
        (nn.Tanh(), False), (nn.GELU(), False), (nn.SiLU(), False), (nn.ELU(), False), (nn.Sigmoid(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
@pytest.mark.parametrize("between", [nn.Identity(), nn.MaxPool1d(1), nn.Dropout(0.0)])
def test_joint_is_for_homogeneous_nonlinearities(activation: nn.Module, legal: bool, between: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), between, activation, nn.Linear(4, 2))
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = copy.deepcopy(activation).double()
    assert torch.allclose(f(9 * x), 9 * f(x)) == legal
    if legal:
        WeightProjection(model, affine="joint")
    else:
        with pytest.raises(ConfigError, match=rf"layer '1', and {type(activation).__name__} comes after"):
            WeightProjection(model, affine="joint")
        WeightProjection(model, affine="decay")


# Which weights are hidden.


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_all_but_the_classifier_are_hidden_in_torchvisions_networks(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    weights = [path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert [hidden.path for hidden in hidden_layers(model)] == weights[:-1]


def test_all_but_the_classifier_are_hidden_in_timms_networks() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "mobilenetv2_035"):
        with torch.device("meta"):
            model = timm.create_model(name)
        weights = [path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert [hidden.path for hidden in hidden_layers(model)] == weights[:-1]


def test_hidden_layers_know_their_norm() -> None:
    model = network("resnet18")
    pairs = {hidden.path: hidden.norm for hidden in hidden_layers(model)}
    for path, norm in pairs.items():
        block, _, name = path.rpartition(".")
        wanted = f"{block}.1" if name == "0" else path.replace("conv", "norm")  # downsample: Sequential(conv, norm)
        assert norm is model.get_submodule(wanted)
    assert len(pairs) == 20


def paths(*modules: nn.Module) -> list[str]:
    return [hidden.path for hidden in hidden_layers(nn.Sequential(*modules))]


def test_pooling_dropout_and_identities_may_stand_between_a_weight_and_its_norm() -> None:
    between = (nn.MaxPool2d(2), nn.Dropout2d(), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Sequential())
    assert paths(nn.Conv2d(3, 4, 3), *between, nn.BatchNorm2d(4)) == ["0"]
    for other in (nn.ReLU(), nn.Linear(4, 4), nn.Flatten(), nn.Softmax(1), nn.PixelShuffle(1)):
        assert "0" not in paths(nn.Conv2d(3, 4, 3), other, nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([4, 5, 5]), nn.RMSNorm([4, 5, 5]),
     *(make_norm(name).layer(4, 2) for name in ("rms_norm", "nap", "adab2n", "switch_norm", "batch_renorm"))],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_norms_of_every_method_count_where_their_channels_fit(norm: nn.Module) -> None:
    assert paths(nn.Conv2d(3, 4, 3), norm) == ["0"]
    assert paths(nn.Conv2d(3, 6, 3), norm) == []


def test_reparameterized_weights_do_not_count() -> None:
    sws, ws = make_norm("sws"), make_norm("ws_group_norm")
    assert paths(sws.conv(3, 4, 3), nn.BatchNorm2d(4)) == []
    assert paths(ws.conv(3, 4, 3), ws.layer(4, 2), nn.Flatten(), nn.Linear(4, 4), ws.layer(4, 0)) == ["3"]
    assert paths(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)) == []
    assert paths(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)) == []


def test_a_shared_weight_is_projected_once_and_not_if_it_is_an_output_too() -> None:
    shared = nn.Linear(4, 4)
    assert paths(shared, nn.LayerNorm(4), nn.ReLU(), shared, nn.LayerNorm(4)) == ["0"]
    assert paths(shared, nn.LayerNorm(4), nn.ReLU(), shared) == []
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    assert paths(shared, nn.LayerNorm(4), nn.ReLU(), tied) == []


def test_attention_is_left_alone() -> None:
    block = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "norm": nn.LayerNorm(4)})
    assert hidden_layers(block) == []
    assert [place.path for place in in_order(block)] == ["attention", "norm"]


def test_frozen_weights_are_left_alone() -> None:
    model = network("mlp")
    model.fc1.weight.requires_grad_(False)
    model.norm2.weight.requires_grad_(False)
    projection = WeightProjection(model, decay=0.0)
    assert list(projection.radii) == ["fc2", "fc3", "fc4"]
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    fc1, scale = model.fc1.weight.clone(), model.norm2.weight.clone()
    projection()
    assert torch.equal(model.fc1.weight, fc1)
    assert torch.equal(model.norm2.weight, scale)


# State, and what is refused.


@pytest.mark.parametrize("affine", ["decay", "joint"])
def test_a_resumed_run_goes_on_with_the_same_bits(affine: str) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, WeightProjection]:
        model = network("cnn")
        return model, torch.optim.Adam(model.parameters(), lr=0.01), WeightProjection(model, affine=affine, every=3)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, after: WeightProjection, steps: slice) -> None:
        step = TrainingStep(model, optimizer, after=[after])
        for images, labels in list(batches(8))[steps]:
            step(images, labels)

    whole = begin()
    go(*whole, slice(0, 8))
    first = begin()
    go(*first, slice(0, 4))
    second = begin()
    shake(second[0])
    resumed = WeightProjection(second[0], affine=affine, every=3)  # other radii, if they were not loaded
    saved = first[2].state_dict()
    assert all(type(value) is Tensor and value.device.type == "cpu" for value in saved.values())
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    resumed.load_state_dict(saved)
    go(second[0], second[1], resumed, slice(4, 8))
    for one, two in zip(whole[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert resumed.updates == 8


def test_the_state_of_another_network_is_refused() -> None:
    saved = WeightProjection(network("mlp")).state_dict()
    assert sorted(saved) == ["radius.fc1", "radius.fc2", "radius.fc3", "radius.fc4", "updates"]
    with pytest.raises(ConfigError, match=r"of other layers: only one side has radius\.conv1"):
        WeightProjection(network("cnn")).load_state_dict(saved)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
        nn.Sequential(make_norm("sws").conv(3, 4, 3), nn.ReLU()),
    ],
    ids=["linear", "plain", "norm first", "sws"],
)
def test_a_network_without_hidden_weights_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"has no weight to project.*fednorm\.convert\(model, 'nap'\)"):
        WeightProjection(model)
    with pytest.raises(ConfigError, match="has no weight to project"):
        make_norm("nap").after_update(model)


def test_initial_weights_without_a_direction_are_refused() -> None:
    for value in (0.0, math.nan, math.inf):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        nn.init.constant_(model[0].weight, value)
        with pytest.raises(ConfigError, match=r"layer '0', shape \(4, 3\), has the initial norm (0|nan|inf)"):
            WeightProjection(model)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="does not know its shape yet"):
        WeightProjection(lazy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"affine": "none"}, "projection.affine must be one of decay, joint, free; got 'none'"),
        ({"decay": -0.1}, "0 to 1; got -0.1"),
        ({"decay": math.nan}, "finite"),
        ({"every": 0}, "an integer of 1 or more; got 0"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WeightProjection(network("mlp"), **options)


def test_only_declared_scales_and_shifts_are_touched() -> None:
    model = shake(network("cnn", "batch_norm"))
    kinds = {
        f"{path}.{name}": spec.tensors[name].kind
        for path, m in model.named_modules()
        if (spec := spec_of(m)) is not None
        for name in m.state_dict()
    }
    before = copy.deepcopy(model.state_dict())
    projection = WeightProjection(model, decay=0.5)
    for hidden in hidden_layers(model):
        hidden.layer.weight.data.mul_(2.0)
    projection()
    changed = {key for key, value in model.state_dict().items() if not torch.allclose(value, before[key])}
    assert changed == {key for key, kind in kinds.items() if kind in (Kind.SCALE, Kind.SHIFT)}


# Norms that do not take the scale away.


@pytest.mark.parametrize(
    ("norm", "invariant"), [("dyt", False), ("seednorm", False), ("bhyt", True), ("pre_affine", True)]
)
def test_a_weight_is_hidden_only_before_a_norm_that_takes_its_scale_away(norm: str, invariant: bool) -> None:
    """Doubling the weight must not matter where it is taken for hidden, and does matter where it is not."""
    torch.manual_seed(0)
    layer: Any = shake(make_norm(norm).layer(6, 0))
    model = nn.Sequential(nn.Linear(4, 6, bias=False), layer, nn.Linear(6, 3)).double()
    x = 100 * torch.randn(5, 4, dtype=torch.float64)
    found = [hidden.path for hidden in hidden_layers(model)]
    before = model(x)
    model[0].weight.data *= 2
    assert torch.allclose(model(x), before, atol=1e-6) == invariant
    assert found == (["0"] if invariant else [])
    if not invariant:
        with pytest.raises(ConfigError, match="has no weight to project"):
            WeightProjection(model)


def test_scales_of_a_norm_that_is_not_scale_invariant_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), make_norm("layer_norm").layer(6, 0), nn.ReLU(),
        nn.Linear(6, 6), make_norm("dyt").layer(6, 0), nn.Linear(6, 3),
    )  # fmt: skip
    projection = WeightProjection(model, decay=0.5)
    assert list(projection.radii) == ["0"]
    projection()
    assert model[4].alpha.item() == 0.5
