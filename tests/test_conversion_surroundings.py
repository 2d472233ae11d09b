"""What a conversion keeps around the layers that it replaces, what it refuses, and what it says it left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

import fednorm
from fednorm.conversion import replacement as conversion
from fednorm.errors import ConfigError, DataError
from fednorm.norms import make_norm, spec_of
from fednorm.training.diagnostics import weight_norms

convert: Any = conversion.convert
convert_with_report: Any = conversion.convert_with_report

METHODS = (
    "batch_norm",
    "group_norm",
    "layer_norm",
    "instance_norm",
    "rms_norm",
    "adab2n",
    "sws",
    "ws_group_norm",
    "none",
)


pytestmark = pytest.mark.usefixtures("own_declarations")


class LeakyBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(super().forward(x), 0.01)


class ConvNextLayerNorm(nn.LayerNorm):
    def __init__(self, width: int, data_format: str) -> None:
        super().__init__(width)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_first":
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The function, up to the norm.


def test_an_activation_inside_the_old_layer_follows_the_new_one() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), LeakyBatchNorm(8)), images(4, 3, 6, 6)
    new, h = convert(net, "group_norm"), net[0](x)
    torch.testing.assert_close(new(x), functional.leaky_relu(functional.group_norm(h, 2), 0.01))
    torch.testing.assert_close(convert(net, "none")(x), functional.leaky_relu(h, 0.01))
    torch.testing.assert_close(convert(net, "sws", gain=False)[1](h), 1.70590343091156 * functional.leaky_relu(h, 0.01))
    assert isinstance(convert(net, "batch_norm")[1], LeakyBatchNorm)


@pytest.mark.parametrize("size", [8, 11])  # with 8, the map is as wide as it has channels
def test_channels_first_layers_are_normalized_over_their_channels(size: int) -> None:
    layer, x = ConvNextLayerNorm(8, "channels_first"), images(3, 8, size, size)
    torch.testing.assert_close(convert(layer, "group_norm")(x), functional.group_norm(x, 2))
    torch.testing.assert_close(
        convert(layer, "batch_norm").train()(x), functional.batch_norm(x, None, None, training=True)
    )
    layer.weight.data.uniform_()
    torch.testing.assert_close(convert(layer, "layer_norm")(x), layer(x))
    last = ConvNextLayerNorm(8, "channels_last")
    torch.testing.assert_close(
        convert(last, "group_norm")(x.movedim(1, -1)), functional.group_norm(x, 2).movedim(1, -1)
    )


def test_what_stands_before_a_layer_elsewhere_does_not_matter() -> None:
    """A 3-D convolution that was registered before, in another branch, says nothing of features (N, C)."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.video = nn.Conv3d(3, 4, 1)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.head(x))
            return y

    x = images(5, 6)
    for name in ("batch_norm", "instance_norm", "switch_norm", "batch_renorm", "layer_norm"):
        model = Branches()
        converted = convert(model, name)
        assert converted(x).shape == (5, 4)
        assert converted.eval()(x).shape == (5, 4)
    h = model.head(x)
    torch.testing.assert_close(convert(model, "instance_norm")(x), functional.layer_norm(h, (4,)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_transformers_of_pytorch_evaluate_with_their_new_norms(name: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    # Layer normalization keeps PyTorch's own fused path, which leaves 0 at masked places.
    nested = batch_first and name != "layer_norm"
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=nested)
    converted = convert(model, name).eval()
    x = images(3, 5, 8) if batch_first else images(5, 3, 8)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    slow = converted(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = converted(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast, slow)
    assert torch.isfinite(fast).all()
    others = x.clone()
    (others[1:] if batch_first else others[:, 1:]).mul_(3.0).add_(1.0)
    moved = converted(others, src_key_padding_mask=mask)
    torch.testing.assert_close(moved[0] if batch_first else moved[:, 0], slow[0] if batch_first else slow[:, 0])


def test_where_the_batch_is_must_be_seen() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            y: Tensor = x + self.attention(h, h, h)[0]
            return y

    with pytest.raises(ConfigError, match=r"'norm' \(LayerNorm\) stands beside a module with batch_first=False"):
        convert(Block(), "group_norm")
    assert convert(Block(), "batch_norm").train()(images(5, 3, 8)).shape == (5, 3, 8)
    x = images(5, 3, 8)
    converted = convert(Block(), "group_norm", example_inputs=x)
    torch.testing.assert_close(
        converted.norm(x),
        functional.group_norm(x.permute(1, 2, 0), 2).permute(2, 0, 1),
    )


# Features.


@pytest.mark.parametrize(
    ("features", "norm", "options", "words"),
    [
        (2, "group_norm", {}, "Set num_groups to one of 1."),
        (8, "group_norm", {"num_groups": 8}, "Set num_groups to one of 1, 2, 4."),
        (1, "layer_norm", {}, "Use 2 or more features"),
        (1, "group_norm", {"num_groups": 1}, "Use 2 or more features"),
        (1, "instance_norm", {}, "Use 2 or more features"),
        (6, "ws_group_norm", {"num_groups": 6}, "Set num_groups to one of 1, 2, 3."),
        (2, "continual_norm", {}, "Set num_groups to one of 1."),
        (1, "nap", {}, "Use 2 or more features"),
    ],
)
def test_a_layer_that_erases_its_input_is_refused(
    features: int, norm: str, options: dict[str, Any], words: str
) -> None:
    net = nn.Sequential(nn.Linear(6, features), nn.BatchNorm1d(features), nn.Tanh(), nn.Linear(features, 3))
    with pytest.raises(ConfigError, match=r"Layer '1' \(BatchNorm1d\)") as caught:
        convert(net, norm, **options)
    assert words in str(caught.value)
    with pytest.raises(ConfigError):
        make_norm(norm, options).layer(features, 0)


def test_maps_of_one_position_with_one_channel_a_group_are_refused_when_they_come() -> None:
    layer = make_norm("group_norm", {"num_groups": 4}).layer(4, 2)
    assert spec_of(layer) is spec_of(nn.GroupNorm(2, 4))
    torch.testing.assert_close(layer(images(2, 4, 3, 3)), functional.group_norm(images(2, 4, 3, 3), 4))
    with pytest.raises(DataError, match="one number a group"):
        layer(images(2, 4, 1, 1))
    with pytest.raises(DataError, match="one number a sample"):
        make_norm("layer_norm").layer(1, 2)(images(2, 1, 1, 1))


def test_positions_make_one_channel_a_group_a_normalization() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    torch.testing.assert_close(
        convert(net, "group_norm", num_groups=4)(images(2, 3, 9)), functional.group_norm(net[0](images(2, 3, 9)), 4)
    )

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x)
            return y

    with pytest.raises(ConfigError, match=r"If it never gets features .* example_inputs"):
        convert(Hidden(), "group_norm", num_groups=4)
    assert convert(Hidden(), "group_norm", num_groups=4, example_inputs=images(2, 4, 9)) is not None
    with pytest.raises(ConfigError, match="does not run on example_inputs"):
        convert(Hidden(), "group_norm", example_inputs=images(2, 5, 9))


# The same method.


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.BatchNorm2d(6, eps=1e-3, momentum=0.01),
        lambda: nn.BatchNorm2d(6, momentum=None),
        lambda: nn.BatchNorm2d(6, affine=False),
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        lambda: nn.GroupNorm(3, 6, eps=0.1),
        lambda: nn.GroupNorm(3, 6, affine=False),
        lambda: nn.LayerNorm(6, eps=0.1, elementwise_affine=False),
        lambda: nn.LayerNorm(6, bias=False),
        lambda: nn.LayerNorm((6, 5, 6)),
        lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        lambda: nn.RMSNorm(6),
    ],
)
def test_a_layer_of_the_method_stays_as_it_is(build: Callable[[], nn.Module]) -> None:
    layer = build()
    spec = spec_of(layer)
    assert spec is not None
    converted, report = convert_with_report(nn.Sequential(layer), spec.name)
    assert report.layers == ["0"]
    assert repr(converted[0]) == repr(layer)
    assert list(converted.state_dict()) == [f"0.{key}" for key in layer.state_dict()]
    x = images(4, 6, 5, 6)
    for mode in (True, False):
        torch.testing.assert_close(converted.train(mode)(x), layer.train(mode)(x))
    for key, value in layer.state_dict().items():
        assert torch.equal(converted.state_dict()[f"0.{key}"], value)


def test_options_that_are_given_are_the_callers_and_the_others_the_layers() -> None:
    layer = nn.BatchNorm2d(6, eps=1e-3, momentum=None, affine=False)
    new = convert(layer, "batch_norm", eps=1e-2)
    assert (new.eps, new.momentum, new.affine) == (1e-2, None, False)
    assert convert(layer, "batch_norm", momentum=0.1).momentum == 0.1
    assert convert(layer, make_norm("batch_norm", {"momentum": 0.3})).momentum == 0.3
    groups = nn.GroupNorm(3, 6, eps=0.1)
    groups.weight.data.uniform_()
    new = convert(groups, "group_norm", num_groups=2)
    assert (new.num_groups, new.eps) == (2, 0.1)
    assert torch.equal(new.weight, groups.weight)


def test_synchronized_and_frozen_batch_norm_become_batch_norm_with_their_tensors() -> None:
    x = images(4, 6, 5, 5)
    for layer in (nn.SyncBatchNorm(6, eps=1e-2, momentum=None), FrozenBatchNorm2d(6, eps=1e-2)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).data.uniform_(0.5, 1.5)
        new = convert(layer.eval(), "batch_norm")
        torch.testing.assert_close(new(x), layer(x))
        assert new.eps == 1e-2
        new.train()(x)


def test_frozen_batch_norm_is_replaced_by_other_methods_with_what_it_has_inside() -> None:
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6), layers.norm_act.FrozenBatchNormAct2d(6))
    x = images(2, 3, 6, 6)
    torch.testing.assert_close(convert(net, "none")(x), functional.relu(net[0](x)))
    new, report = convert_with_report(net, "group_norm")
    assert report.layers == ["1", "2"]
    assert all(parameter.requires_grad for parameter in new.parameters())
    assert all(not p.requires_grad for p in convert(net.requires_grad_(False), "group_norm").parameters())


# What stands around.


def tied() -> nn.Sequential:
    net = nn.Sequential(*[m for _ in range(2) for m in (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())])
    net[3].weight, net[4].weight, net[4].running_mean = net[0].weight, net[1].weight, net[1].running_mean
    return net


@pytest.mark.parametrize("name", METHODS)
def test_tensors_that_were_one_stay_one(name: str) -> None:
    new: Any = convert(tied(), name)
    assert new[3].weight is new[0].weight
    assert getattr(new[4], "weight", None) is getattr(new[1], "weight", None)
    assert getattr(new[4], "running_mean", None) is getattr(new[1], "running_mean", None)
    if name not in ("none", "sws", "rms_norm"):
        assert new[4].bias is not new[1].bias
    if name == "sws":
        assert new[3].gain is new[0].gain
    assert len({id(p) for p in new.parameters()}) == len(list(new.parameters()))


def test_a_tie_that_cannot_stay_is_refused() -> None:
    net = tied()
    net.scale = net[1].weight
    with pytest.raises(ConfigError, match=r"scale, 1\.weight, 4\.weight are one tensor"):
        convert(net, "group_norm")
    assert convert(net, "batch_norm").scale is not None
    assert convert(net, "none").scale is not None


@pytest.mark.parametrize("name", METHODS)
def test_what_was_frozen_stays_frozen(name: str) -> None:
    def net() -> Any:
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)),
            nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)),
        )

    model = net()
    model[0].requires_grad_(False)
    model[1][1].bias.requires_grad_(False)
    new: Any = convert(model, name)
    assert not any(p.requires_grad for p in new[0].parameters())
    trained = {key for key, p in new[1].named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in new[1].named_parameters()} - {"1.bias"}


@pytest.mark.parametrize("name", METHODS)
def test_hooks_are_called_as_before(name: str) -> None:
    calls: list[str] = []
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    for index in (0, 1):
        net[index].register_forward_hook(lambda *_: calls.append("forward"))
        net[index].register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
        net[index].register_full_backward_hook(lambda *_: calls.append("backward"))
        register: Any = net[index]
        register.register_state_dict_post_hook(lambda *_: calls.append("state"))
        register.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    new = convert(net, name)
    calls.clear()
    new(images(2, 3, 6, 6).requires_grad_()).sum().backward()
    new.load_state_dict(new.state_dict())
    assert sorted(calls) == sorted(["forward", "pre", "backward", "state", "load"] * 2)


def test_a_hook_that_belongs_to_the_layer_is_refused() -> None:
    class Watched(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_forward_hook(self.watch)

        def watch(self, *_: Any) -> None:
            pass

    with pytest.raises(ConfigError, match=r"'0' \(Watched\) has a hook that is a method of its own \(watch\)"):
        convert(nn.Sequential(Watched(4)), "group_norm")


wn: Any = parametrizations.weight_norm
cut: Any = prune.l1_unstructured
WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": wn,
    "older spectral_norm": spectral_norm,
    "older weight_norm": weight_norm,
    "pruning": lambda layer: cut(layer, "weight", amount=0.5),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_are_computed_are_kept_or_refused(kind: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(WRAPPERS[kind](nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU()), images(4, 3, 8, 8)
    net(x)  # the older ones keep a weight with a history
    net.eval()
    new, report = convert_with_report(net, "none")
    torch.testing.assert_close(new(x), functional.relu(net[0](x)))
    assert set(dict(new.named_parameters())) == {k for k, _ in net.named_parameters() if k.startswith("0.")}
    assert [left.path for left in report.left] == ["0"]
    assert any("kept on 0 " in note for note in report.notes)
    for name in ("sws", "ws_group_norm"):
        with pytest.raises(ConfigError, match=r"Convolution '0' has a parametrization.* on weight"):
            convert(net, name)
    scaled = nn.Sequential(WRAPPERS["weight_norm"](nn.Linear(3, 3)), wn(nn.LayerNorm(3), dim=None))
    with pytest.raises(ConfigError, match=r"Layer '1' .* has a parametrization.* on weight"):
        convert(scaled, "group_norm", num_groups=1)
    assert spec_of(convert(scaled, "layer_norm")[1]) is not None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["none", "group_norm", "switch_norm"])
def test_what_a_spectral_normalization_remembers_is_not_moved_by_a_look(name: str, training: bool) -> None:
    """Its power iteration takes a step whenever the weight is read in training mode."""
    torch.manual_seed(0)
    spectral = parametrizations.spectral_norm
    net = nn.Sequential(spectral(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), spectral(nn.Linear(4, 4)), nn.LayerNorm(4))
    net.train(training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    new = convert(net, name)
    weight_norms(net)
    weight_norms(new)
    for key, value in before.items():
        assert torch.equal(net.state_dict()[key], value)
        assert "parametrizations" not in key or torch.equal(new.state_dict()[key], value)
    assert all(module.training == training for path, module in new.named_modules() if "parametrizations" in path)


def test_types_devices_and_modes_are_those_of_the_old_layer_or_its_neighbours() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.ReLU())
    net.double()
    net[2].eval()
    new = convert(net, "group_norm")
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert [m.training for m in new.modules()] == [True, True, True, False]
    fused: Any = nn.Sequential(pytest.importorskip("timm.layers").BatchNormAct2d(4, drop_layer=nn.Dropout))
    fused[0].drop.eval()
    assert [m.training for m in convert(fused, "group_norm")[0]] == [True, False, True]
    with torch.device("meta"):
        meta = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert {p.device.type for p in convert(meta, "switch_norm").parameters()} == {"meta"}
    with torch.device("meta"):
        assert {p.device.type for p in convert(net, "switch_norm").parameters()} == {"cpu"}
    half = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()
    half[1].running_mean, half[1].running_var = half[1].running_mean.float(), half[1].running_var.float()
    renorm: Any = convert(half, "batch_renorm")[1]
    assert (renorm.weight.dtype, renorm.running_var.dtype) == (torch.float16, torch.float32)


def test_other_references_follow() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.steps = [self.conv, self.norm]
            self.table = {"norm": (self.norm,)}

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    new: Any = convert(Listed(), "sws")
    assert new.steps == [new.conv, new.norm]
    assert new.table["norm"][0] is new.norm
    x = images(2, 3, 4, 4)
    torch.testing.assert_close(new(x), new.conv(x))


def test_a_model_that_keeps_its_features_can_be_copied() -> None:
    class Keeper(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.features = {"last": [self[0](x)]}
            y: Tensor = self[1](self.features["last"][0])
            return y

    net = Keeper(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net(images(2, 3, 4, 4))
    assert convert(net, "group_norm")(images(2, 3, 4, 4)).shape == (2, 4, 4, 4)


# What is refused, and what is said.


script: Any = torch.jit.script


class Conditional(nn.BatchNorm2d):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * condition


def with_buffer() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_buffer("mask", torch.ones(4))
    return layer


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Doubled(4), r"'1' \(Doubled\) descends from LayerNorm.*fednorm\.declare\(Doubled"),
        (lambda: Conditional(4), r"'1' \(Conditional\) descends from BatchNorm2d"),
        (lambda: nn.LayerNorm((4, 5, 5)), r"'1' \(LayerNorm\) normalizes over the shape \(4, 5, 5\)"),
        (with_buffer, r"'1' \(BatchNorm2d\) has more than .*: mask, which would be lost"),
        (lambda: script(nn.BatchNorm2d(4)), r"'1' \(RecursiveScriptModule\) is compiled"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_what_cannot_be_kept_is_refused_with_its_path(build: Callable[[], nn.Module], words: str) -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), build())
    with pytest.raises(ConfigError, match=words):
        convert(net, "group_norm")


def test_declarations_are_the_way_out_that_the_errors_name() -> None:
    net, x = nn.Sequential(nn.BatchNorm2d(4), Doubled(5)), images(2, 4, 5, 5)
    fednorm.declare(Doubled, like=None)
    new, report = convert_with_report(net, "none")
    torch.testing.assert_close(new(x), net[1](x))
    assert [(left.path, left.type) for left in report.left] == [("1", "Doubled")]
    fednorm.declare(Doubled, like=nn.LayerNorm, activation=lambda layer: nn.Hardtanh(0, layer.eps * 1e5))
    torch.testing.assert_close(convert(net, "none")(x), x.clamp(0, 1))


def test_layers_of_unknown_formula_are_said() -> None:
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.BatchNorm2d(8), layers.EvoNorm2dS0(8), nn.LocalResponseNorm(2), nn.Conv1d(1, 1, 1))
    _, report = convert_with_report(net, "none")
    assert [(left.path, left.type) for left in report.left] == [
        ("1", "EvoNorm2dS0"), ("2", "LocalResponseNorm"), ("3", "Conv1d")
    ]  # fmt: skip
    assert any("1 (EvoNorm2dS0), 2 (LocalResponseNorm)" in note for note in report.notes)
    with pytest.raises(
        ConfigError, match=r"would change nothing. Left, for their formula is unknown: 0 \(EvoNorm2dS0\)"
    ):
        convert(nn.Sequential(layers.EvoNorm2dS0(8)), "group_norm")


# Drawn module trees.


class Residual(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for part in self.parts:
            h = part(h)
        return x + h


C = 4


@st.composite
def leaves(draw: st.DrawFn) -> nn.Module:
    kind = draw(st.sampled_from(["conv", "bn", "bn", "leaky", "gn", "ln", "act", "spectral", "frozen"]))
    eps = draw(st.sampled_from([1e-5, 1e-3]))
    if kind in ("bn", "leaky"):
        momentum = draw(st.sampled_from([0.1, 0.01, None]))
        affine, track = draw(st.booleans()), draw(st.booleans())
        made = (nn.BatchNorm2d if kind == "bn" else LeakyBatchNorm)(C, eps, momentum, affine, track)
    else:
        build: dict[str, Callable[[], Any]] = {
            "conv": lambda: nn.Conv2d(C, C, 3, padding=1, bias=draw(st.booleans())),
            "gn": lambda: nn.GroupNorm(draw(st.sampled_from([1, 2])), C, eps),
            "ln": lambda: ConvNextLayerNorm(C, "channels_first"),
            "act": lambda: draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.Dropout(0.0)])),
            "spectral": lambda: WRAPPERS["spectral_norm"](nn.Conv2d(C, C, 1)),
            "frozen": lambda: FrozenBatchNorm2d(C, eps),
        }
        made = build[kind]()
    made.requires_grad_(draw(st.booleans()))
    return made.train(draw(st.booleans()))


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    pool = draw(st.lists(leaves(), min_size=2, max_size=4))

    def build(depth: int) -> nn.Module:
        if depth == 0 or draw(st.booleans()):
            return draw(st.sampled_from(pool))  # also twice: shared
        parts = [build(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        made: nn.Module = draw(st.sampled_from([nn.Sequential, Residual]))(*parts)
        return made

    net = nn.Sequential(build(2), build(2), nn.BatchNorm2d(C))
    plain = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    if len(plain) > 1 and draw(st.booleans()):
        plain[-1].weight = plain[0].weight
    return net


def pattern(model: nn.Module) -> tuple[Any, ...]:
    """Return names, requires_grad and ties of the parameters outside normalization layers, and every mode."""
    ids: dict[int, int] = {}
    own = [
        (f"{path}.{name}", p.requires_grad, ids.setdefault(id(p), len(ids)))
        for path, module in model.named_modules(remove_duplicate=False)
        if not ((spec := spec_of(module)) is not None and spec.normalizes)
        for name, p in module.named_parameters(recurse=False)
    ]
    return tuple(own), tuple((path, m.training) for path, m in model.named_modules())


@settings(max_examples=25, deadline=None)
@given(net=trees(), seed=st.integers(0, 9))
def test_drawn_trees_keep_their_function_when_every_layer_is_of_the_method(net: nn.Module, seed: int) -> None:
    x = images(3, C, 5, 5, seed=seed)
    for key, value in net.state_dict().items():
        if key.endswith(("weight", "running_var")) and value.ndim == 1:
            value.uniform_(0.5, 1.5)
    for module in net.modules():  # layers of other methods than batch normalization stay out of this test
        for name, child in module._modules.items():
            if isinstance(child, nn.GroupNorm | nn.LayerNorm):
                module._modules[name] = nn.Identity()
    new = convert(net, "batch_norm")
    if not any(isinstance(m, FrozenBatchNorm2d) for m in net.modules()):
        assert pattern(new) == pattern(net)
        assert [(k, p.requires_grad) for k, p in new.named_parameters()] == [
            (k, p.requires_grad) for k, p in net.named_parameters()
        ]
        state = copy.deepcopy(net.state_dict())
        torch.testing.assert_close(new(x), net(x))
        assert list(new.state_dict()) == list(state)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(new.state_dict()[key], value)
    torch.testing.assert_close(new.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def parameters(module: nn.Module) -> torch.Tensor:
    """Return what lies under a parametrization: reading a spectral norm's weight in training mode changes it."""
    return nn.utils.parameters_to_vector(module.parameters())


@settings(max_examples=25, deadline=None)
@given(net=trees(), name=st.sampled_from(["group_norm", "layer_norm", "adab2n", "none", "switch_norm"]))
def test_drawn_trees_keep_what_surrounds_their_layers(net: nn.Module, name: str) -> None:
    x = images(3, C, 5, 5)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    new, report = convert_with_report(net, name)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    # A training pass of its own: it moves what a spectral normalization remembers, and with it the function.
    assert copy.deepcopy(new)(x).shape == new.eval()(x).shape == x.shape
    for path, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            twin: Any = new.get_submodule(path)
            assert torch.equal(parameters(twin), parameters(module)) or name == "none"
            assert type(twin).__name__ == type(module).__name__
    frozen = {p.data_ptr() for p in net.parameters() if not p.requires_grad}
    if len(frozen) == len(list(net.parameters())):
        assert not any(p.requires_grad for p in new.parameters())
    if name == "none":
        skipped = copy.deepcopy(net)
        for module in skipped.modules():
            for key, child in module._modules.items():
                if isinstance(child, LeakyBatchNorm):
                    module._modules[key] = nn.LeakyReLU(0.01)
                elif isinstance(child, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | FrozenBatchNorm2d):
                    module._modules[key] = nn.Identity()
        torch.testing.assert_close(new(x), skipped.eval()(x), rtol=1e-4, atol=1e-5)
    assert len(report.layers) == len(set(report.layers))
