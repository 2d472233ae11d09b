"""The architectures, against published parameter counts, torchvision's networks and formulas written out here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2 as TorchvisionMobileNetV2

from fednorm.cards import MODELS, NORMS
from fednorm.errors import ConfigError, DataError, UnknownNameError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.spec import Norm

SMALL = {
    "alexnet": 64,
    "cnn": 12,
    "digits_cnn": 12,
    "mlp": 8,
    "mobilenet_v2": 16,
    "resnet18": 16,
    "spd_head": 12,
    "vit": 8,
}
WIDTH = {"cnn": 8, "digits_cnn": 16, "mlp": 32, "mobilenet_v2": 8, "resnet18": 8, "spd_head": 8, "vit": 8}


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Norm):
    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        return {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[spatial_dims](num_channels)


@dataclass(frozen=True, kw_only=True)
class NormalizerFree(Norm):
    """Standardised once, which at initialisation is the same; circular padding, so that borders lose no variance."""

    alpha: float = 1.0

    def conv(self, *args: Any, **kwargs: Any) -> nn.Conv2d:
        conv = nn.Conv2d(*args, **{**kwargs, "bias": False, "padding_mode": "circular"})
        with torch.no_grad():
            rows = conv.weight.flatten(1).double()
            rows = rows - rows.mean(1, keepdim=True)
            rows = rows / (rows.square().mean(1, keepdim=True).sqrt() * math.sqrt(rows.shape[1]))
            conv.weight.copy_(rows.reshape(conv.weight.shape))
        return conv

    def activation(self, name: str = "relu") -> nn.Module:
        return nn.Sequential(super().activation(name), Times(math.sqrt(2 / (1 - 1 / math.pi))))

    @property
    def residual_alpha(self) -> float | None:
        return self.alpha


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(name: str, norm: Norm, seed: int = 0) -> nn.Module:
    return make_model(name, norm, num_classes=7, image_size=SMALL[name], width=WIDTH.get(name, 0), seed=seed)


def outline(name: str, norm: Norm) -> nn.Module:
    """Return the small network without values, which those of AlexNet take long to draw."""
    with torch.device("meta"):
        return small(name, norm)


def images(name: str, n: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, SMALL[name], SMALL[name], generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module) -> None:
    """Give every tensor a value of its own, so that no two can be confused."""
    generator = torch.Generator().manual_seed(5)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
            elif key.endswith("running_var") or key.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise.abs())
            else:
                tensor.copy_(0.2 * noise)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    ours, theirs = source.state_dict(), target.state_dict()
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    target.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))


# --- sizes and names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "count"),
    [
        ("digits_cnn", 0, 14_219_210),  # Flower's FedBN baseline README
        ("resnet18", 64, 11_173_962),  # kuangliu/pytorch-cifar
        ("resnet18", 0, 11_173_962),
        ("mobilenet_v2", 0, 3_504_872 - 1281 * 1000 + 1281 * 10),  # torchvision's, with 10 classes
        ("mlp", 0, 2_366_474 + 4 * 2 * 512),  # 3072 → 512 → 512 → 512 → 512 → 10, written out in tests/models
        ("cnn", 0, 555_754 + 2 * (4 * 32 + 256)),
        ("vit", 0, 2_693_194),  # written out in tests/models
        # torchvision's AlexNet with 10 classes, and a scale and a shift a channel
        ("alexnet", 0, 61_100_840 - 4097 * 1000 + 4097 * 10 + 2 * (64 + 192 + 384 + 256 + 256 + 4096 + 4096)),
    ],
)
def test_parameter_counts_with_batch_norm(name: str, width: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(make_model(name, BatchNorm(), num_classes=10, width=width)) == count


def test_slim_resnet18_has_the_continual_learning_literatures_widths() -> None:
    model = make_model("resnet18", BatchNorm(), num_classes=100, width=20)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)][::5] == [20, 40, 80, 160]
    assert model.get_submodule("fc").in_features == 160  # type: ignore[union-attr]


def test_digits_cnn_state_names_are_stable() -> None:
    names = list(make_model("digits_cnn", BatchNorm(), num_classes=10).state_dict())
    stats = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [
        f"{layer}.{t}" for i in (1, 2, 3) for layer, ts in ((f"conv{i}", stats[:2]), (f"norm{i}", stats)) for t in ts
    ]
    expected += [
        f"{layer}.{t}" for i in (1, 2) for layer, ts in ((f"fc{i}", stats[:2]), (f"norm{i + 3}", stats)) for t in ts
    ]
    assert names == [*expected, "fc3.weight", "fc3.bias"]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("alexnet", "6e3e38a8c204"),
        ("cnn", "9bc9f4ab1021"),
        ("digits_cnn", "1a52febd3c06"),
        ("mlp", "cc4a5e3babc0"),
        ("mobilenet_v2", "3a597abce589"),
        ("resnet18", "e82e49dd1b09"),
        ("vit", "b7a68a4984cd"),
    ],
)
def test_state_names_are_those_of_earlier_checkpoints(name: str, digest: str) -> None:
    names = "\n".join(outline(name, BatchNorm()).state_dict())
    assert hashlib.sha256(names.encode()).hexdigest()[:12] == digest


def test_shortcut_norms_are_nested_where_a_search_by_name_misses_them() -> None:
    model = small("resnet18", BatchNorm())
    nested = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "norm" not in n]
    assert nested == ["layer2.0.downsample.1", "layer3.0.downsample.1", "layer4.0.downsample.1"]
    lost = [key for key in model.state_dict() if any(key.startswith(f"{n}.") for n in nested)]
    assert len(lost) == 15


def test_biases_follow_the_published_networks() -> None:
    published = {"digits_cnn": True, "alexnet": True, "cnn": True, "resnet18": False, "mobilenet_v2": False}
    for name, bias in published.items():
        convs = [m for m in outline(name, BatchNorm()).modules() if isinstance(m, nn.Conv2d)]
        assert {conv.bias is not None for conv in convs} == {bias}


# --- what is computed --------------------------------------------------------------------------------------------


def test_digits_cnn_computes_the_published_network() -> None:
    model = make_model("digits_cnn", BatchNorm(), num_classes=10).double()
    randomise(model)
    x = torch.randn(4, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = dict(model.state_dict())

    def norm(h: Tensor, i: int) -> Tensor:
        axes = [a for a in range(h.ndim) if a != 1]
        mean, var = h.mean(axes, keepdim=True), h.var(axes, keepdim=True, unbiased=False)
        shape = [1, -1] + [1] * (h.ndim - 2)
        scaled = (h - mean) / (var + 1e-5).sqrt() * w[f"norm{i}.weight"].view(shape) + w[f"norm{i}.bias"].view(shape)
        return scaled.clamp_min(0)

    h = x
    for i in (1, 2, 3):
        h = norm(F.conv2d(h, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=2), i)
        if i < 3:
            h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    h = h.reshape(4, 6272)
    for i in (1, 2):
        h = norm(h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"], i + 3)
    expected = h @ w["fc3.weight"].T + w["fc3.bias"]
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.few(1)
@pytest.mark.parametrize("train", [True, False])
def test_resnet18_equals_torchvisions(train: bool) -> None:
    theirs = torchvision.models.resnet18(num_classes=7)
    ours = make_model("resnet18", BatchNorm(), num_classes=7).train(train)
    randomise(ours)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    copy_in_order(ours, theirs)
    x = images("resnet18")
    assert [k.replace("norm", "bn") for k in ours.state_dict()] == list(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs.train(train)(x), rtol=0, atol=0)


@pytest.mark.few(2)
@pytest.mark.parametrize("width", [32, 24, 48])
def test_mobilenet_v2_equals_torchvisions(width: int) -> None:
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    theirs = TorchvisionMobileNetV2(
        num_classes=7, width_mult=width / 32, inverted_residual_setting=stages, dropout=0.0
    ).train()
    theirs.features[0][0].stride = (1, 1)
    ours = make_model("mobilenet_v2", BatchNorm(), num_classes=7, width=width)
    randomise(ours)
    copy_in_order(ours, theirs)
    assert [k for k in ours.state_dict() if k.startswith("features")] == list(theirs.state_dict())[:-2]
    x = images("mobilenet_v2")
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [63, 96])
def test_alexnet_without_norms_equals_torchvisions(size: int) -> None:
    ours = make_model("alexnet", Norm(), num_classes=7, image_size=size)
    theirs = torchvision.models.alexnet(num_classes=7, dropout=0.0)
    copy_in_order(ours, theirs)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_alexnet_has_a_norm_after_each_layer_but_the_last() -> None:
    kinds = [type(m) for m in outline("alexnet", BatchNorm()) if not isinstance(m, nn.MaxPool2d)]  # type: ignore[union-attr]
    conv, fc = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU], [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*conv * 5, nn.AdaptiveAvgPool2d, nn.Flatten, *fc * 2, nn.Linear]


# --- the normalizer-free form ------------------------------------------------------------------------------------


def record(model: nn.Module, names: list[str], x: Tensor) -> list[float]:
    """Return each named block's output variance: over (N, H, W), averaged over the channels."""
    found: list[float] = []
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _m, _i, out: found.append(out.var((0, 2, 3)).mean().item()))
        for n in names
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def set_skip_gains(model: nn.Module, value: float) -> int:
    gains = [p for n, p in model.named_parameters() if n.endswith("skip_gain")]
    for gain in gains:
        gain.data.fill_(value)
    return len(gains)


BLOCKS = [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_nf_resnet18_keeps_the_expected_variance(alpha: float) -> None:
    model = make_model("resnet18", NormalizerFree(alpha=alpha), num_classes=10, width=32)
    assert set_skip_gains(model, 1.0) == 8
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Each stage starts anew at 1: the stem's output in the first, the shortcut's convolution in the others.
    expected = [1 + alpha**2, 1 + 2 * alpha**2] * 4
    measured = record(model, BLOCKS, x)
    assert measured == pytest.approx(expected, rel=0.12)


def test_nf_resnet18_divides_by_the_standard_deviation_that_enters_each_block() -> None:
    model = make_model("resnet18", NormalizerFree(alpha=0.2), num_classes=10, width=8)
    first, last = 1 / math.sqrt(1.04), 1 / math.sqrt(1.08)
    betas = [model.get_submodule(name).beta for name in BLOCKS]
    assert betas == pytest.approx([1.0, first, last, first, last, first, last, first], rel=1e-12)


def test_nf_resnet18_computes_the_papers_block() -> None:
    model = make_model("resnet18", NormalizerFree(alpha=0.3), num_classes=10, width=8).double()
    set_skip_gains(model, 0.7)
    block = model.get_submodule("layer2.0")
    w = {k: v for k, v in block.state_dict().items() if v.ndim == 4}
    gamma = math.sqrt(2 / (1 - 1 / math.pi))
    h = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, stride=stride)

    a = gamma * (h / math.sqrt(1 + 2 * 0.3**2)).clamp_min(0)
    branch = conv(gamma * conv(a, w["conv1.weight"], 2).clamp_min(0), w["conv2.weight"], 1)
    expected = F.conv2d(a, w["downsample.0.weight"], stride=2) + 0.3 * 0.7 * branch
    torch.testing.assert_close(block(h), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_nf_networks_start_as_their_shortcuts_alone(name: str) -> None:
    model = small(name, NormalizerFree())
    gains = {n: p for n, p in model.named_parameters() if n.endswith("skip_gain")}
    assert gains
    assert all(p.shape == () and p.item() == 0 for p in gains.values())
    model(images(name)).square().sum().backward()
    # Zero gains learn at once; what lies behind them does not until they move.
    assert all(p.grad is not None and p.grad.abs() > 0 for p in gains.values())
    before = model(images(name))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "residual") and module.residual is not None:
                branch = module.conv2 if name == "resnet18" else module.conv
                for p in branch.parameters():
                    p.add_(1.0)
    torch.testing.assert_close(model(images(name)), before)


def test_nf_mobilenet_v2_keeps_the_expected_variance() -> None:
    alpha = 1.0
    model = make_model("mobilenet_v2", NormalizerFree(alpha=alpha), num_classes=10)
    assert set_skip_gains(model, 1.0) == 10
    stages = [1, 2, 3, 4, 3, 3, 1]
    expected = [1 + k * alpha**2 for blocks in stages for k in range(blocks)]
    # beta is the deviation that enters: of the block before.
    betas = [model.get_submodule(f"features.{i}").beta for i in range(1, 18)]
    assert betas == pytest.approx([1.0] + [1 / math.sqrt(v) for v in expected[:-1]], rel=1e-12)
    # Block by block, each on white noise of the deviation it expects: through the whole network the channels' means,
    # which standardised 1×1 convolutions remove on average only, add some 4 % a stage.
    generator = torch.Generator().manual_seed(0)
    for i, variance in enumerate(expected, start=1):
        block = model.get_submodule(f"features.{i}")
        channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
        noise = torch.randn(8, channels, 16, 16, generator=generator)
        with torch.no_grad():
            measured = block(noise / block.beta).var((0, 2, 3)).mean().item()
        assert measured == pytest.approx(variance, rel=0.12), f"block {i}"


# --- the factory -------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MODELS.names)
def test_forward_and_backward_reach_every_parameter(name: str) -> None:
    model = small(name, BatchNorm())
    logits = model(images(name))
    assert logits.shape == (3, 7)
    assert logits.dtype == torch.float32
    F.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant added before batch normalization cannot matter, so those gradients are zero up to rounding.
    assert [n for n in still if not n.endswith("bias")] == []


@pytest.mark.few(2)
@pytest.mark.parametrize("name", MODELS.names)
def test_weights_depend_on_the_seed_and_on_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = small(name, BatchNorm(), seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = small(name, BatchNorm(), seed=3).state_dict()
    other = small(name, BatchNorm(), seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    weights = [k for k, v in first.items() if v.ndim > 1 and "log_" not in k]  # those of spd_norm begin at 0
    assert weights
    assert not any(torch.equal(first[k], other[k]) for k in weights)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", MODELS.names)
def test_a_norm_that_draws_nothing_leaves_the_convolutions_as_they_are(name: str) -> None:
    plain, normed = small(name, Norm()).state_dict(), small(name, BatchNorm()).state_dict()
    assert plain.keys() < normed.keys()
    assert all(torch.equal(plain[k], normed[k]) for k in plain)


@pytest.mark.parametrize("name", MODELS.names)
def test_cards_are_complete(name: str) -> None:
    spec = MODELS[name]
    assert spec.name == name
    assert spec.citation.arxiv
    assert spec.input_size >= spec.min_size
    assert spec.input_size % spec.size_step == 0
    assert spec.has_width == (name in WIDTH)
    assert MODELS[f" {name.replace('_', '-').upper()}"].name == name


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(quarter=st.integers(1, 9), classes=st.integers(1, 12), n=st.integers(1, 3))
def test_digits_cnn_takes_every_multiple_of_4(quarter: int, classes: int, n: int) -> None:
    size = 4 * quarter
    model = make_model("digits_cnn", Norm(), num_classes=classes, image_size=size)
    assert model.get_submodule("fc1").in_features == 128 * quarter**2
    assert model(torch.zeros(n, 3, size, size)).shape == (n, classes)


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 33), name=st.sampled_from(["resnet18", "mobilenet_v2"]))
def test_networks_that_average_take_every_size(size: int, name: str) -> None:
    model = make_model(name, Norm(), num_classes=4, image_size=size, width=8)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: make_model("resnet8", Norm(), num_classes=3), UnknownNameError, "Did you mean 'resnet18'"),
        (
            lambda: make_model("digits_cnn", Norm(), num_classes=3, image_size=30),
            ConfigError,
            "multiple of 4.*got .*30",
        ),
        (lambda: make_model("digits_cnn", Norm(), num_classes=3, image_size=-4), ConfigError, "at least 4 pixels"),
        (lambda: make_model("alexnet", Norm(), num_classes=3, image_size=62), ConfigError, "at least 63 pixels.*62"),
        (
            lambda: make_model("alexnet", Norm(), num_classes=3, width=64),
            ConfigError,
            "fixed width.*cnn, digits_cnn, mlp, mobilenet_v2, resnet18",
        ),
        (
            lambda: make_model("mobilenet_v2", Norm(), num_classes=3, width=20),
            ConfigError,
            "multiple of 8.*got width = 20",
        ),
        (lambda: make_model("resnet18", Norm(), num_classes=3, width=-1), ConfigError, "got width = -1"),
        (lambda: make_model("resnet18", Norm(), num_classes=0), ConfigError, "at least 1 class"),
        (
            lambda: make_model("cnn", Norm(), num_classes=3, activation="crelu"),
            ConfigError,
            "model.activation must be one of relu, .*leaky_relu.*'crelu'",
        ),
        (
            lambda: small("mlp", Norm())(torch.zeros(2, 3, 8, 9)),
            DataError,
            r"this mlp .*\(N, 3, 8, 8\).*\(2, 3, 8, 9\)",
        ),
        (
            lambda: small("digits_cnn", Norm())(torch.zeros(2, 3, 28, 28)),
            DataError,
            r"\(N, 3, 12, 12\).*\(2, 3, 28, 28\)",
        ),
        (lambda: small("digits_cnn", Norm())(torch.zeros(2, 1, 12, 12)), DataError, r"\(2, 1, 12, 12\)"),
    ],
)
def test_bad_input_is_explained(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# --- another nonlinearity ----------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules()]


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", [name for name in MODELS.names if name != "vit"])
@pytest.mark.parametrize("norm_name", ["batch_norm", "sws"])
def test_another_nonlinearity_takes_the_place_of_every_relu_and_nothing_else_changes(name: str, norm_name: str) -> None:
    norm = make_norm(norm_name)
    size = {"num_classes": 7, "image_size": SMALL[name], "width": WIDTH.get(name, 0), "seed": 3}
    plain = make_model(name, norm, **size)  # type: ignore[arg-type]
    leaky = make_model(name, norm, **size, activation="Leaky-ReLU")  # type: ignore[arg-type]
    relus = (nn.ReLU, nn.ReLU6)
    assert any(kind in relus for kind in kinds(plain))
    assert kinds(leaky) == [nn.LeakyReLU if kind in relus else kind for kind in kinds(plain)]
    state = leaky.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    # The constant of sws is the other nonlinearity's: 1 / std of leaky_relu(z) for standard normal z.
    gammas = {m.gamma for m in leaky.modules() if hasattr(m, "gamma")}
    assert gammas == (set() if norm_name == "batch_norm" else {1.70590341091156})


def test_the_other_nonlinearity_is_what_is_computed() -> None:
    model = make_model("mlp", Norm(), num_classes=3, image_size=2, width=5, activation="tanh").double()
    w = model.state_dict()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = x.reshape(4, 12)
    for i in range(1, 5):
        h = torch.tanh(h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"])
    torch.testing.assert_close(model(x), h @ w["fc5.weight"].T + w["fc5.bias"])


def test_the_transformer_without_a_relu_is_refused() -> None:
    with pytest.raises(ConfigError, match="vit has no ReLU that tanh could take the place of"):
        make_model("vit", Norm(), num_classes=2, activation="tanh")


def test_a_model_without_a_relu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gelu_only(norm: Norm, **_: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 2), norm.activation("gelu"))

    card = replace(MODELS["mlp"], make=gelu_only)
    monkeypatch.setattr("fednorm.models.MODELS", {"mlp": card})
    assert kinds(make_model("mlp", Norm(), num_classes=2))[-1] is nn.GELU
    with pytest.raises(ConfigError, match="mlp has no ReLU that leaky_relu could take the place of"):
        make_model("mlp", Norm(), num_classes=2, activation="leaky_relu")


def test_the_norm_prepares_the_network_that_is_returned() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrapped(Norm):
        def prepare(self, model: nn.Module) -> nn.Module:
            assert [m for m in model.modules() if isinstance(m, nn.Tanh)]
            return nn.Sequential(model, Times(2.0))

    plain = small("mlp", Norm())
    wrapped = make_model("mlp", Wrapped(), num_classes=7, image_size=8, width=32, activation="tanh")
    assert isinstance(wrapped[1], Times)  # type: ignore[index]
    assert torch.equal(wrapped.state_dict()["0.fc1.weight"], plain.state_dict()["fc1.weight"])


def test_62_pixels_are_too_few_for_alexnet_and_63_are_not() -> None:
    layers = torchvision.models.alexnet(num_classes=2).features
    assert layers(torch.zeros(1, 3, 63, 63)).shape[-2:] == (1, 1)
    with pytest.raises(RuntimeError):
        layers(torch.zeros(1, 3, 62, 62))


PLACES = {"vit": ("vit",), "resnet18": ("mobilenet_v2", "resnet18", "vit")}
"""Where methods have a place that not every network has: the models with attention, and those with branches."""


PAIRS = [(name, norm_name) for norm_name in NORMS.names for name in MODELS.names]


def has_a_place(name: str, norm_name: str) -> bool:
    return name in PLACES.get(NORMS[norm_name].tried_on, MODELS.names)


@pytest.mark.parametrize(("name", "norm_name"), [pair for pair in PAIRS if not has_a_place(*pair)])
def test_a_norm_without_a_place_is_refused(name: str, norm_name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{norm_name} .* has n.*--model"):
        outline(name, make_norm(norm_name))


@pytest.mark.few(1)
@pytest.mark.parametrize(("name", "norm_name"), [pair for pair in PAIRS if has_a_place(*pair)])
def test_contract_with_every_norm(name: str, norm_name: str) -> None:
    options: dict[str, Any] = {"num_groups": 4} if "group_norm" in norm_name else {}
    if norm_name == "dyt":
        options = {"alpha_init": 2.0}  # nothing makes a small signal larger again: with 0.5 mobilenet_v2 loses it
    norm = make_norm(norm_name, options)
    model = small(name, norm)
    logits = model(images(name, n=4))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 2, 4, 6])).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == []
    # Differ between images: a norm that erased the signal would not.
    assert logits.std(0).min() > 0
    state = model.state_dict()
    other = small(name, make_norm(norm_name, options), seed=1)
    other.load_state_dict(state)
    torch.testing.assert_close(other.eval()(images(name)), model.eval()(images(name)), rtol=0, atol=0)
