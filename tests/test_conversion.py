"""``convert`` on torchvision's, timm's and our own models: what changes, what stays, what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import NORMS
from fednorm.conversion.replacement import ConversionReport, convert, convert_with_report
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.federation.plan import norm_plan
from fednorm.norms import make_norm, spec_of
from fednorm.norms.sws import ScaledActivation, SWSConv2d
from fednorm.norms.weight_compander import Companded
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.roles import NORMALIZATION, RoleRule

WITHOUT_LAYERS = frozenset({"anfr", "none", "selu", "sws", "weight_compander"})
"""Methods that leave no normalization layer."""


class PreActivation(nn.Module):
    """A block whose activation works in place on what its norm returns, and which keeps its input for the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.conv(self.act(self.anything(x)))
        return y


class Nested(nn.Module):
    """Three levels deep, a shared activation, names that betray nothing, a norm after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.ReLU()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), shared)
        self.body = nn.ModuleDict({"a": nn.Sequential(PreActivation(), nn.Sequential(PreActivation()))})
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), shared, nn.Linear(6, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body["a"](self.stem(x)))
        return y


def timm_model(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(name, num_classes=4)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25),
    "timm resnet18": lambda: timm_model("resnet18"),
    "timm mobilenetv2_035 (BatchNormAct2d)": lambda: timm_model("mobilenetv2_035"),
    "nested": Nested,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built = MODELS[request.param]()
    built.train()
    with torch.no_grad():  # running moments away from 0 and 1
        built(torch.randn(4, 3, 32, 32))
    return built


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def normalizing(module: nn.Module) -> list[str]:
    return [path for path, m in module.named_modules() if (spec := spec_of(m)) is not None and spec.normalizes]


ANYWHERE = [name for name in NORMS.names if NORMS[name].tried_on == "digits_cnn"]
"""The methods that every network has a place for: not those that replace attention or residual sums."""


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ANYWHERE)
def test_every_normalization_layer_is_replaced_and_weights_are_kept(model: nn.Module, name: str) -> None:
    before = copy.deepcopy(model.state_dict())
    converted, report = convert_with_report(model, name)
    assert report.layers == normalizing(model)
    nothing: set[str] = set()
    wanted = {"ws_group_norm": {"group_norm"}}.get(name, nothing if name in WITHOUT_LAYERS else {name})
    if name in ("instance_norm", "region_norm") and any(isinstance(m, nn.BatchNorm1d) for m in model.modules()):
        wanted = {name, "layer_norm"}  # features have no positions
    assert {spec_of(converted.get_submodule(path)).name for path in normalizing(converted)} == wanted  # type: ignore[union-attr]
    after = converted.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer, weight = converted.get_submodule(path), before[f"{path}.weight"]
            if isinstance(layer, Companded):  # which keeps what it computes with
                torch.testing.assert_close(layer.computed_weight(), weight, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(after[f"{path}.weight"], weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the input was changed"
    assert not {p.data_ptr() for p in converted.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ANYWHERE)
def test_converted_models_train_and_are_placed_by_the_plan(model: nn.Module, name: str) -> None:
    converted = convert(model, name)
    # 32x32 images end in maps of one position, which these refuse.
    converted(images(3, 64 if name in ("instance_norm", "region_norm") else 32)).square().sum().backward()
    missing = [key for key, parameter in converted.named_parameters() if parameter.grad is None]
    assert missing == []
    plan = norm_plan(converted, RoleRule())
    assert [entry.key for entry in plan.entries] == list(converted.state_dict())
    assert any(entry.kind in NORMALIZATION for entry in plan.entries) == (name not in WITHOUT_LAYERS)


def test_converting_batch_norm_to_batch_norm_keeps_the_function(model: nn.Module) -> None:
    converted = convert(model.eval(), "batch_norm")
    torch.testing.assert_close(converted(images()), model(images()))
    assert not converted.training
    model.train()


@pytest.mark.few(3)
def test_no_normalization_is_the_model_with_its_layers_skipped(model: nn.Module) -> None:
    """Affine-free batch norm that evaluates with mean 0 and variance 1 - eps is the identity, activations included."""
    skipped = copy.deepcopy(model).eval()
    for module in skipped.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
            assert module.running_var is not None
            module.running_var.fill_(1 - module.eps)
    torch.testing.assert_close(convert(model, "none").eval()(images()), skipped(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "kind"), [("sws", SWSConv2d), ("ws_group_norm", WSConv2d)])
def test_weight_methods_take_every_convolution_with_its_geometry(
    model: nn.Module, name: str, kind: type[nn.Conv2d]
) -> None:
    converted, report = convert_with_report(model, name)
    convolutions = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert report.convolutions == list(convolutions)
    for path, old in convolutions.items():
        new = converted.get_submodule(path)
        assert type(new) is kind
        for attribute in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
            assert getattr(new, attribute) == getattr(old, attribute)
        if old.bias is not None:
            assert torch.equal(new.bias, old.bias)
        elif name == "sws":
            assert torch.equal(new.bias, torch.zeros(old.out_channels))
        else:
            assert new.bias is None


@pytest.mark.few(1)
def test_activations_carry_gamma_only_where_it_is_on(model: nn.Module) -> None:
    def scaled(**options: Any) -> tuple[int, ConversionReport]:
        converted, report = convert_with_report(model, "sws", **options)
        return sum(isinstance(m, ScaledActivation) for m in converted.modules()), report

    plain = sum(isinstance(m, nn.ReLU | nn.ReLU6) for m in model.modules())
    count, report = scaled()
    assert (count, len(report.activations)) == (plain, plain)
    assert any("Residual scaling" in note for note in report.notes)
    assert scaled(activation_gain=False, alpha=0.0)[0] == 0
    assert scaled(activation_gain=False, alpha=0.0)[1].notes == []


def test_activations_behind_a_removed_layer_do_not_overwrite_the_shortcut() -> None:
    torch.manual_seed(0)
    block = PreActivation()
    converted = convert(block, "sws")
    conv = converted.conv
    assert isinstance(conv, SWSConv2d)
    x = torch.randn(2, 8, 5, 5)
    kept = x.clone()
    gamma = 1.7139588594436646
    expected = x + functional.conv2d(
        gamma * functional.relu(x), conv.standardized_weight(), conv.bias, padding=1, groups=2
    )
    torch.testing.assert_close(converted(x), expected)
    assert torch.equal(x, kept)


def test_fused_layers_keep_their_activation() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    fused = timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU).eval()
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(convert(fused, "none")(x), functional.silu(x))
    torch.testing.assert_close(convert(fused, "sws")(x), 1.7881293296813965 * functional.silu(x))
    torch.testing.assert_close(convert(fused, "group_norm")(x), functional.silu(functional.group_norm(x, 2)))


def test_a_shared_module_stays_shared() -> None:
    converted = convert(Nested(), "sws")
    assert isinstance(converted.stem[1], ScaledActivation)  # type: ignore[index]
    assert converted.stem[1] is converted.head[4]  # type: ignore[index]


def test_layers_with_channels_last_are_normalized_over_channels() -> None:
    """torchvision's vision transformer and ConvNeXt have nn.LayerNorm over the last axis."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    layer = nn.LayerNorm(6)
    converted = convert(nn.Sequential(nn.Linear(6, 6), layer), "batch_norm")[1].train()  # type: ignore[index]
    expected = functional.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)
    assert converted(x[:, 0]).shape == (3, 6)
    layer.weight.data.uniform_()
    torch.testing.assert_close(convert(layer, "layer_norm", over="channels")(x), layer(x))


def test_a_convnext_converts() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm_model("convnext_atto").eval()
    same = convert(model, "layer_norm", over="channels", eps=1e-6)
    torch.testing.assert_close(same(images()), model(images()), rtol=1e-4, atol=1e-4)
    converted, report = convert_with_report(model, "batch_norm")
    assert report.layers == normalizing(model)
    assert converted.train()(images()).shape == (2, 4)


def test_converting_back_gives_plain_convolutions_and_activations() -> None:
    torch.manual_seed(0)
    once, _ = convert_with_report(Nested(), "ws_group_norm")
    back, _ = convert_with_report(once, "batch_norm")
    assert {type(m) for m in back.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    scaled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ScaledActivation(nn.ReLU(), 1.7))
    assert not any(isinstance(m, ScaledActivation) for m in convert(scaled, "batch_norm").modules())


def test_types_modes_and_frozen_weights_are_kept() -> None:
    model = Nested().double()
    model.body.eval()
    model.stem[0].weight.requires_grad_(False)
    converted = convert(model, "sws")
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    assert [m.training for m in converted.children()] == [True, False, True]
    assert not converted.stem[0].weight.requires_grad  # type: ignore[index, union-attr]
    assert converted.stem[0].bias.requires_grad  # type: ignore[index, union-attr]


def test_the_callers_generator_is_left_alone() -> None:
    model = Nested()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = convert(model, "sws"), convert(model, "sws")
    assert torch.equal(torch.rand(3), expected)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


def test_a_configured_norm_is_taken_as_it_is() -> None:
    converted = convert(Nested(), make_norm("group_norm", {"num_groups": 1, "eps": 0.5}))
    layers = [m for m in converted.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in layers} == {(1, 0.5)}
    with pytest.raises(ConfigError, match="has its own already"):
        convert(Nested(), make_norm("group_norm"), num_groups=1)


@pytest.mark.parametrize(
    "name", [name for name in ANYWHERE if not make_norm(name).inserts and not make_norm(name).brings_activation]
)
def test_a_conversion_that_would_do_nothing_is_refused(name: str) -> None:
    mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"Sequential has no normalization layer .* would change nothing"):
        convert(mlp, name)


def test_standardized_weights_without_a_layer_to_take_the_scale_back_are_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(ConfigError, match="no normalization layer"):
        convert(plain, "ws_group_norm")
    assert isinstance(convert(plain, "sws")[0], SWSConv2d)  # type: ignore[index]


def test_errors_name_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"Layer '1' \(BatchNorm2d\).*9 channels"):
        convert(nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9)), "group_norm")
    with pytest.raises(ConfigError, match=r"Layer '0' \(LazyBatchNorm2d\) does not know its shape"):
        convert(nn.Sequential(nn.LazyBatchNorm2d()), "group_norm")
    with pytest.raises(ConfigError, match=r"Convolution '0'.*two or more weights"):
        convert(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)), "sws")
    with pytest.raises(UnknownNameError):
        convert(Nested(), "btach_norm")


def test_a_convolution_with_a_forward_pass_of_its_own_is_refused_by_weight_methods_only() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(timm_layers.Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match="Convolution '0' is a Conv2dSame"):
        convert(model, "sws")
    for name in ("group_norm", "none"):
        assert isinstance(convert(model, name)[0], timm_layers.Conv2dSame)  # type: ignore[index]


# Methods that want a layer before every nonlinearity: nap.


def plain_cnn() -> nn.Sequential:
    """Build a network without normalization, pooling before a nonlinearity and one nonlinearity after the output."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, groups=2), nn.MaxPool2d(2), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, 5), nn.Dropout(0.0), nn.Tanh(), nn.Linear(5, 2), nn.Sigmoid(),
    )  # fmt: skip


def test_layers_are_inserted_before_every_nonlinearity_of_a_network_without_any() -> None:
    model = plain_cnn().eval()
    converted, report = convert_with_report(model, "nap", eps=1e-5)
    assert (report.layers, report.inserted) == ([], ["1", "4", "9"])
    assert any("Removed, as NaP has it: 0.bias, 2.bias, 7.bias." in note for note in report.notes)
    x = images(3, 16)
    h = functional.conv2d(x, model[0].weight)
    h = functional.relu(functional.layer_norm(h, h.shape[1:]))
    h = functional.max_pool2d(functional.conv2d(h, model[2].weight, groups=2), 2)
    h = functional.leaky_relu(functional.layer_norm(h, h.shape[1:]), 0.2)
    h = functional.linear(h.flatten(1), model[7].weight)
    h = torch.tanh(functional.layer_norm(h, h.shape[1:]))
    torch.testing.assert_close(converted(x), torch.sigmoid(model[10](h)), rtol=1e-4, atol=1e-5)
    assert isinstance(converted[9], nn.Sequential)  # type: ignore[index]
    assert [name for name, _ in converted[9].named_children()] == ["norm", "activation"]  # type: ignore[index]
    assert not any(m.training for m in converted.modules())
    assert torch.equal(model[0].bias, plain_cnn()[0].bias), "the input was changed"
    assert {entry.norm for entry in norm_plan(converted, RoleRule()).entries} == {"", "nap"}


def test_inserted_layers_make_the_network_independent_of_its_hidden_weights_scale() -> None:
    converted = convert(plain_cnn().double().eval(), "nap", eps=1e-14)
    before = converted(images(3, 16).double())
    for index in (0, 2, 7):
        converted[index].weight.data *= 3.0  # type: ignore[index, operator, union-attr]
    torch.testing.assert_close(converted(images(3, 16).double()), before, rtol=1e-8, atol=1e-9)
    projection = make_norm("nap").after_update(converted)
    assert list(projection.radii) == ["0", "2", "7"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "inserted"), [("alexnet", 7), ("vgg11", 10), ("squeezenet1_1", 25)])
def test_torchvisions_networks_without_normalization_become_nap_networks(name: str, inserted: int) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=4)
        converted, report = convert_with_report(model, "nap")
        assert converted(torch.empty(2, 3, 64, 64)).shape == (2, 4)
    assert len(report.inserted) == inserted
    weights = [path for path, m in converted.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with_bias = [path for path in weights if converted.get_parameter(f"{path}.weight") is not None
                 and converted.get_submodule(path).bias is not None]  # fmt: skip
    assert with_bias == weights[-1:]
    kept = {key for key, _ in model.named_parameters() if key.endswith("weight")}
    assert kept <= {key for key, _ in converted.named_parameters()}, "weights keep their names"


def test_existing_layers_become_nap_layers_and_biases_before_them_go(model: nn.Module) -> None:
    converted, report = convert_with_report(model, "nap")
    assert report.inserted == []
    order = [m for m in converted.modules() if not list(m.children())]
    for layer, after in itertools.pairwise(order):
        if isinstance(layer, nn.Linear | nn.Conv2d) and (spec := spec_of(after)) is not None:
            assert spec.name == "nap"
            assert layer.bias is None


def test_nonlinearities_that_a_normalized_network_leaves_bare_are_named() -> None:
    with torch.device("meta"):
        _, report = convert_with_report(torchvision.models.vgg11_bn(), "nap")
    assert any("none stands before: classifier.1, classifier.4." in note for note in report.notes)


def test_linear_layers_get_their_layer_over_the_last_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    converted = convert(model, "nap", over="channels", statistics="rms_norm")
    x = torch.randn(3, 5, 4)  # as many tokens as channels: over axis 1 nothing would fail
    hidden = functional.gelu(functional.rms_norm(functional.linear(x, model[0].weight), (5,)))  # type: ignore[arg-type]
    torch.testing.assert_close(converted(x), model[2](hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(converted(x[:, 0]), model[2](hidden)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "axes"), [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose2d, 2)])
def test_convolutions_of_every_dimension_get_a_layer(kind: type[nn.Module], axes: int) -> None:
    model = nn.Sequential(kind(3, 4, 2), nn.ReLU(), kind(4, 2, 2)).double().eval()  # type: ignore[call-arg]
    converted = convert(model, "nap")
    assert converted(torch.ones(2, 3, *[4] * axes, dtype=torch.float64)).dtype == torch.float64
    assert converted[0].bias is None  # type: ignore[index, union-attr]
    assert not converted[1].training  # type: ignore[index, union-attr]


@pytest.mark.parametrize("name", ["none", "sws"])
def test_networks_that_were_converted_away_from_normalization_come_back(name: str) -> None:
    bare = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)), name)
    converted, report = convert_with_report(bare, "nap")
    assert report.inserted == ["2"]
    assert type(converted[0]) is nn.Conv2d  # type: ignore[index]
    assert torch.equal(converted[0].weight, bare[0].weight)  # type: ignore[index, union-attr]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(functional.relu(self.first(x)))
        return y


class OneActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.act(self.second(self.act(self.first(x)))))
        return y


def several_places() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (Functional, r"between 'first' \(Linear\) and its activation.*'second' \(Linear\) comes after it.*F\.relu"),
        (OneActivation, r"between 'first' \(Linear\).*'second' \(Linear\) comes after it.*give every layer its own"),
        (several_places, r"between '0' \(Linear\).*'1' \(ReLU\) comes after it, and stands in other places too"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)), "has nothing that NaP could normalize"),
        (lambda: nn.ReLU(), "has nothing that NaP could normalize"),
    ],
    ids=["functional", "one activation", "several places", "output layer only", "no layer"],
)
def test_networks_whose_nonlinearities_cannot_be_placed_are_refused(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(build(), "nap")


@pytest.mark.parametrize("attention", [False, True], ids=["convolutions", "attention"])
def test_what_is_looked_at_grows_as_the_network_does(attention: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def visits(blocks: int) -> int:
        """Return how many modules and parameters are visited where so many blocks are converted."""

        def block() -> nn.Module:
            if attention:
                return nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        model, seen = nn.Sequential(*(block() for _ in range(blocks))), []
        for name in ("named_modules", "_named_members"):
            plain = getattr(nn.Module, name)

            def counted(*args: Any, of: Any = plain, **kwargs: Any) -> Iterator[Any]:
                for each in of(*args, **kwargs):
                    seen.append(1)
                    yield each

            monkeypatch.setattr(nn.Module, name, counted)
        convert(model, "rms_norm" if attention else "sws")
        monkeypatch.undo()
        return len(seen)

    assert visits(60) < 2.5 * visits(30)
