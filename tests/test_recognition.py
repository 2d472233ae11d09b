"""What is taken for a normalization layer, and for which: by type, by formula, by declaration; never by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

import fednorm
from fednorm.errors import ConfigError
from fednorm.norms import recognition_of, spec_of
from fednorm.spec import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("own_declarations")


class LlamaRMSNorm(nn.Module):
    """As Hugging Face writes it, also for T5 and Mistral."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(kind)


class GemmaRMSNorm(nn.Module):
    """As Hugging Face writes it: a weight of 0 is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


class ConvNextLayerNorm(nn.LayerNorm):
    """As Hugging Face writes it: one class, two layouts."""

    def __init__(self, width: int, *, data_format: str = "channels_last") -> None:
        super().__init__(width, eps=1e-6)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_first":
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class Handwritten(nn.Module):
    """Channels first, other names, other shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, width, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.gamma + self.beta


class LeakyBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(super().forward(x), 0.03)


class Relaxed(nn.BatchNorm1d):
    """Takes any input; computes what its ancestor does."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


KNOWN: tuple[tuple[Callable[[], nn.Module], tuple[Any, ...]], ...] = (
    (lambda: nn.LayerNorm(8), ("layer_norm", True, (0, 1, 2, 3), False, None)),
    (lambda: nn.BatchNorm1d(8), ("batch_norm", False, (0, 1), False, None)),
    (lambda: nn.BatchNorm3d(8), ("batch_norm", False, (3,), False, None)),
    (lambda: nn.SyncBatchNorm(8), ("batch_norm", False, (0, 1, 2, 3), False, None)),
    (lambda: Relaxed(8), ("batch_norm", False, (0, 1, 2, 3), False, None)),
    (lambda: LayerNorm2d(8), ("layer_norm", False, (2,), False, None)),
    (lambda: LlamaRMSNorm(8), ("rms_norm", True, (0, 1, 2, 3), False, None)),
    (lambda: GemmaRMSNorm(8), ("rms_norm", True, (0, 1, 2, 3), False, None)),
    (lambda: ConvNextLayerNorm(8), ("layer_norm", True, (0, 1, 2, 3), False, None)),
    (lambda: ConvNextLayerNorm(8, data_format="channels_first"), ("layer_norm", False, (2,), False, None)),
    (lambda: Handwritten(8), ("layer_norm", False, (2,), False, None)),
    (lambda: LeakyBatchNorm(8), ("batch_norm", False, (2,), False, "LeakyReLU(negative_slope=0.03)")),
    (lambda: FrozenBatchNorm2d(8), ("", False, (2,), False, None)),
)


def card(layer: nn.Module) -> tuple[Any, ...] | None:
    known = recognition_of(layer)
    if known is None:
        return None
    activation = None if known.activation is None else repr(known.activation(layer))
    return (known.spec.name if known.spec else "", known.channels_last, known.dims, known.fused, activation)


@pytest.mark.parametrize(("build", "expected"), KNOWN, ids=lambda value: None if callable(value) else str(value))
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_are_known_by_what_they_compute(
    build: Callable[[], nn.Module], expected: tuple[Any, ...], device: str
) -> None:
    state = torch.get_rng_state()
    with torch.device(device):
        layer = build()
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        state = torch.get_rng_state()
        assert card(layer) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
    if device == "cpu":
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


TIMM = {
    "GroupNorm1": ("group_norm", False, (0, 1, 2, 3), False, None),
    "LayerNorm": ("layer_norm", True, (0, 1, 2, 3), False, None),
    "LayerNormFp32": ("layer_norm", True, (0, 1, 2, 3), False, None),
    "LayerNorm2d": ("layer_norm", False, (2,), False, None),
    "LayerNorm2dFp32": ("layer_norm", False, (2,), False, None),
    "LayerNormExp2d": ("layer_norm", False, (2,), False, None),
    "RmsNorm": ("rms_norm", True, (0, 1, 2, 3), False, None),
    "RmsNormFp32": ("rms_norm", True, (0, 1, 2, 3), False, None),
    "RmsNorm2d": ("rms_norm", False, (2,), False, None),
    "RmsNorm2dFp32": ("rms_norm", False, (2,), False, None),
    "BatchNormAct2d": ("batch_norm", False, (2,), True, None),
    "FrozenBatchNormAct2d": ("", False, (2,), True, None),
    "GroupNormAct": ("group_norm", False, (0, 1, 2, 3), True, None),
    "GroupNorm1Act": ("group_norm", False, (0, 1, 2, 3), True, None),
    "LayerNormAct": ("layer_norm", True, (0, 1, 2, 3), True, None),
    "LayerNormAct2d": ("layer_norm", False, (2,), True, None),
    "RmsNormAct2d": ("rms_norm", False, (2,), True, None),
    "EvoNorm2dS0": None,
    "EvoNorm2dB0": None,
    "FilterResponseNormTlu2d": None,
    "SplitBatchNorm2d": None,
    "SimpleNorm2d": None,
    "LayerScale": None,
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_layers_are_known(name: str) -> None:
    layers = pytest.importorskip("timm.layers")
    kind = getattr(layers, name, None) or getattr(layers.norm, name, None) or getattr(layers.norm_act, name)
    assert card(kind(64)) == TIMM[name]


class Doubled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Noisy(nn.BatchNorm2d):
    """Evaluates as its ancestor does, and trains otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.3, self.training)


class Positive(nn.GroupNorm):
    """Its forward pass is inherited; what that reads is not."""

    @property
    def eps(self) -> float:
        return 0.5

    @eps.setter
    def eps(self, value: float) -> None:
        pass


class NormedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.normalize(x), functional.normalize(self.weight))


class ScaleNorm(nn.Module):
    """Named like one, built like one, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def patched() -> nn.Module:
    layer = nn.LayerNorm(8)
    layer.forward = lambda x: x.sin()  # type: ignore[method-assign, assignment]
    return layer


@pytest.mark.parametrize(
    "build", [lambda: Doubled(8), lambda: Noisy(8), NormedLinear, ScaleNorm, patched, lambda: nn.Linear(8, 8)]
)
def test_a_forward_pass_of_its_own_is_not_taken_for_the_ancestors(build: Callable[[], nn.Module]) -> None:
    assert spec_of(build()) is None
    assert recognition_of(build()) is None


def test_what_an_inherited_forward_pass_reads_may_be_its_own() -> None:
    """The property changes eps, so the layer is run; the formula with that eps fits."""
    assert card(Positive(2, 8)) == ("group_norm", False, (0, 1, 2, 3), False, None)


class Configured(nn.LayerNorm):
    """What it applies is a function that it keeps, or that an object of its keeps."""

    def __init__(self, width: int, after: Any) -> None:
        super().__init__(width)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        after = self.after[0] if isinstance(self.after, list) else self.after
        y: Tensor = after(super().forward(x))
        return y


@pytest.mark.parametrize("wrap", [lambda after: after, lambda after: [after]])
def test_layers_of_one_class_may_differ_in_what_they_hold(wrap: Callable[[Any], Any]) -> None:
    cards = [card(Configured(8, wrap(after))) for after in (functional.relu, torch.tanh, torch.sin)]
    assert [None if known is None else known[4] for known in cards] == ["ReLU()", "Tanh()", None]


def test_a_declaration_is_the_last_word() -> None:
    assert spec_of(Doubled(8)) is None
    assert fednorm.declare(Doubled, like=nn.LayerNorm) is Doubled
    assert card(Doubled(8)) == ("layer_norm", True, (0, 1, 2, 3), False, None)
    fednorm.declare(Doubled, like=nn.LayerNorm, channels_first=True, activation="relu")
    assert card(Doubled(8)) == ("layer_norm", False, (0, 1, 2, 3), False, "ReLU()")
    fednorm.declare(LayerNorm2d, like=None)
    assert recognition_of(LayerNorm2d(8)) is None
    fednorm.declare(Handwritten, like=nn.RMSNorm, tensors={"gamma": "scale", "beta": "shift"})
    spec = spec_of(Handwritten(8))
    assert spec is not None
    assert {name: tensor.kind.value for name, tensor in spec.tensors.items()} == {"gamma": "scale", "beta": "shift"}


def test_usual_names_of_a_declared_class_are_understood_and_others_are_not() -> None:
    class Centred(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(8)))

    fednorm.declare(Centred, like=nn.LayerNorm)
    spec = spec_of(Centred("gamma", "beta", "mystery"))
    assert spec is not None
    kinds = {name: tensor.kind.value for name, tensor in spec.tensors.items()}
    assert kinds == {"weight": "scale", "bias": "shift", "gamma": "scale", "beta": "shift"}


def test_descendants_of_a_declared_class_count_unless_they_compute_otherwise() -> None:
    class Same(Doubled):
        pass

    class Other(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin()

    fednorm.declare(Doubled, like=nn.LayerNorm)
    assert spec_of(Same(8)) is not None
    assert spec_of(Other(8)) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((nn.LayerNorm(3), {"like": nn.LayerNorm}), "expects a class of modules"),
        ((Doubled, {"like": nn.Linear}), "like Linear, which fednorm does not know"),
        ((Doubled, {"like": "layer_norm"}), "fednorm does not know"),
        ((Doubled, {"like": None, "activation": "relu"}), "leave the other options out"),
        ((Doubled, {"like": nn.LayerNorm, "activation": "rleu"}), r"declare\.activation must be one of relu"),
        ((Doubled, {"like": nn.LayerNorm, "activation": nn.ReLU()}), "must be a name, a class or a function"),
        ((Doubled, {"like": nn.LayerNorm, "tensors": {"weight": "scael"}}), "the kinds are weight, gain, scale"),
    ],
)
def test_a_declaration_that_says_nothing_is_refused(arguments: Any, words: str) -> None:
    kind, options = arguments
    with pytest.raises(ConfigError, match=words):
        fednorm.declare(kind, **options)


@pytest.mark.parametrize("width", [2, 3, 16])
@pytest.mark.parametrize("after", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.25), nn.ELU(), nn.Identity()])
@pytest.mark.parametrize("base", [nn.LayerNorm, nn.RMSNorm])
def test_an_activation_is_seen_on_few_channels_too(base: Any, after: nn.Module, width: int) -> None:
    """Of two channels layer normalization makes 1 and -1, which shifts may hide from an activation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = after(base.forward(self, x))
        return y

    layer = type("Drawn", (base,), {"forward": forward})(width)
    known = recognition_of(layer)
    assert known is not None
    x = torch.linspace(-9, 9, 50)
    found = x if known.activation is None else known.activation(layer)(x)
    torch.testing.assert_close(found, after(x))


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(2, 12),
    family=st.sampled_from(["layer_norm", "rms_norm", "batch_norm", "group_norm"]),
    last=st.booleans(),
    activation=st.sampled_from([None, "relu", "gelu", "silu", "tanh"]),
    factor=st.sampled_from([1.0, 1.0, 1.5, -1.0]),
    child=st.booleans(),
)
def test_drawn_classes_are_known_exactly_when_they_compute_a_known_formula(
    width: int, family: str, last: bool, activation: str | None, factor: float, child: bool
) -> None:
    bases: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
        "layer_norm": (nn.LayerNorm, (width,)),
        "rms_norm": (nn.RMSNorm, (width,)),
        "batch_norm": (nn.BatchNorm2d, (width,)),
        "group_norm": (nn.GroupNorm, (1, width)),
    }
    base, arguments = bases[family]
    after = None if activation is None else ACTIVATIONS[activation]()

    def forward(self: Any, x: Tensor) -> Tensor:
        moved = x.movedim(1, -1) if base in (nn.LayerNorm, nn.RMSNorm) and not last else x
        y: Tensor = factor * base.forward(self, moved)
        y = y.movedim(-1, 1) if moved is not x else y
        return y if after is None else (self.act if child else after)(y)

    layer = type("Drawn", (base,), {"forward": forward})(*arguments)
    if child and after is not None:
        layer.act = after
    known = recognition_of(layer)
    if factor != 1.0:
        assert known is None
        return
    assert known is not None
    assert known.spec is not None
    assert known.spec.name == family
    assert known.channels_last == (last and base in (nn.LayerNorm, nn.RMSNorm))
    x = torch.randn(50)
    found = nn.Identity() if known.activation is None else known.activation(layer)
    wanted = nn.Identity() if after is None or child else after
    torch.testing.assert_close(found(x), wanted(x))
    assert known.fused == (child and after is not None)
