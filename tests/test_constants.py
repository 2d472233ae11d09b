"""Buffers that training never writes are constants; those that it writes are not; what is unknown can be declared."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
import torchvision
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fednorm
from fednorm.errors import ConfigError, RoleError, UnknownNameError
from fednorm.federation.constants import constant_prints, differing
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.plan import norm_plan
from fednorm.recognition.buffers import observe
from fednorm.recognition.inputs import Example
from fednorm.recognition.tensor_kinds import declared_tensors, forget_tensors
from fednorm.roles import Kind, Role, RoleRule
from strategies.fedavg import FedAvg
from strategies.fedbn import FedBN
from strategies.silobn import SiloBN

STRATEGIES = (FedAvg, FedBN, SiloBN)


class Normalize(nn.Module):
    """Normalizes images by a fixed mean and deviation."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4), persistent)
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.2), persistent)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


WRITES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "in place": lambda m, x: m.state.mul_(0.9).add_(x.mean()),
    "in place, under no_grad, through a view": lambda m, x: m.state[:1].copy_(x.detach().mean()),
    "replaced": lambda m, x: setattr(m, "state", m.state * 0.9 + x.detach().mean()),
    "through data": lambda m, x: m.state.data.add_(x.detach().mean()),
    "by index": lambda m, x: m.state.__setitem__(0, x.detach().mean()),
    "with out": lambda m, x: torch.add(m.state, x.detach().mean(), out=m.state),
    "a maximum so far that stays": lambda m, x: torch.maximum(m.state, x.detach().mean() - 9, out=m.state),
    "foreach": lambda m, x: torch._foreach_add_([m.state], x.numel()),
    "batch_norm's statistics": lambda m, x: F.batch_norm(x.detach(), m.state, m.other, training=True),
}


class Stateful(nn.Module):
    """A layer that writes a buffer called ``state`` in one of many ways, and keeps a table."""

    def __init__(self, how: str, persistent: bool = True) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("state", torch.ones(3), persistent)
        self.register_buffer("other", torch.ones(3), persistent)
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.how:
            with torch.no_grad():
                WRITES[self.how](self, x)
        return x + self.table[0]


def small(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        layer, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    for layer in (Stateful, Normalize, Opaque, Scaled, Child):
        forget_tensors(layer)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_that_training_does_not_write_are_constants(strategy: type[FedAvg], device: str) -> None:
    model = small(Normalize()).to(device)
    plan = strategy(model).plan
    assert plan.keys(Role.CONSTANT) == ("0.mean", "0.std")
    assert {plan.by_key[key].kind for key in plan.keys(Role.CONSTANT)} == {Kind.CONSTANT}
    assert not {"0.mean", "0.std"} & {*plan.sent, *plan.local}
    assert plan.summary(1)["constant"] == 2
    assert plan.bytes_by_role()["constant"] == 2 * 3 * 4


@pytest.mark.few(1)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_windowed_attentions_index_tables_are_constants(device: str) -> None:
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [7, 7], num_classes=2)
    maxvit = torchvision.models.MaxVit((64, 64), 8, 2, [8], [1], 8, 0.0, num_classes=2)
    for model, tables in ((swin, 2), (maxvit, 2)):
        plan = FedBN(model.to(device)).plan
        assert plan.count(Role.CONSTANT) == tables
        assert all(key.endswith("relative_position_index") for key in plan.keys(Role.CONSTANT))
        assert plan.count(Role.LOCAL) > 0


@pytest.mark.slow
def test_timms_efficientformer_is_placed() -> None:
    plan = FedAvg(timm.create_model("efficientformer_l1", num_classes=2)).plan
    assert plan.keys(Role.CONSTANT) == ("stages.3.blocks.4.token_mixer.attention_bias_idxs",)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", WRITES)
def test_a_buffer_that_training_writes_is_refused_and_the_remedy_helps(how: str, device: str) -> None:
    model = small(Stateful(how)).to(device)
    words = r"module '0' \(Stateful\) owns the buffer 'state'.*which training writes"
    with pytest.raises(RoleError, match=words) as refused:
        FedAvg(model)
    heed(refused.value, Stateful)
    plan = FedAvg(model).plan
    assert plan.keys(Role.CONSTANT)[-1] == "0.table"
    assert "0.state" in plan.sent


def heed(refusal: RoleError, layer: type[nn.Module]) -> None:
    """Run the call that a refusal names."""
    call = re.search(r"fednorm\.declare_tensors\(.*?\)", str(refusal))
    assert call, f"no remedy in: {refusal}"
    eval(call[0], {"fednorm": fednorm, layer.__name__: layer})


def test_the_model_and_every_generator_are_left_as_they_were() -> None:
    model = small(Stateful("")).eval()
    model[1].requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    FedAvg(model)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model[1].parameters()] == [False, False]


@given(
    side=st.sampled_from([8, 28, 30, 48]),
    channels=st.integers(1, 5),
    half=st.booleans(),
    hows=st.lists(st.sampled_from(["", *WRITES]), min_size=1, max_size=3),
)
@settings(max_examples=8, deadline=None)
def test_drawn_models_have_their_written_buffers_and_no_others(
    side: int, channels: int, half: bool, hows: list[str]
) -> None:
    layers = [Stateful(how) if how != "batch_norm's statistics" else Stateful("in place") for how in hows]
    convolution = nn.Conv2d(channels, 3, 3, padding=1)
    model = nn.Sequential(convolution, *layers, nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(3 * side**2, 2))
    if half:
        model.bfloat16()
    seen = observe(model)
    assert seen.reason == ""
    assert seen.written == {(str(i), "state") for i, how in enumerate(hows, 1) if how}


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 2)), (6,)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)), (2352,)),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 2)), (1, 28, 28)),
        (lambda: nn.Sequential(nn.Conv1d(2, 2, 3), nn.AdaptiveAvgPool1d(1)), (2, 32)),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1)), (1, 8, 32, 32)),
        (lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2)), (16,)),
        (lambda: nn.LSTM(5, 3), (16, 5)),
        (lambda: nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), (5, 32, 32)),
        (lambda: torchvision.models.VisionTransformer(48, 8, 1, 2, 8, 8, num_classes=2), (3, 48, 48)),
    ],
)
def test_an_input_is_guessed_from_the_layers(model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    seen = observe(model())
    assert (seen.reason, seen.example and seen.example.shape) == ("", shape)


def test_an_input_has_the_size_and_the_channels_that_the_model_names() -> None:
    model = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 2, 3), nn.Flatten(), nn.Linear(2 * 23 * 23, 2))
    model.default_cfg = {"input_size": (3, 100, 100)}
    assert observe(model).example == Example((3, 100, 100))
    model.default_cfg = {}
    assert observe(model).reason.startswith("no input was found that it takes; the last try, of shape (2, 48, ")


def test_values_are_used_where_shapes_do_not_do() -> None:
    class Branching(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.mean()) < 1e9 else x * 2)

    seen = observe(small(Branching("in place")))
    assert seen.example == Example((3, 32, 32))
    assert {place for place in seen.written if place[0] == "0"} == {("0", "state")}


class Opaque(Normalize):
    """Takes two inputs, which nobody can guess."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


def test_a_model_that_cannot_be_run_is_refused_with_its_reason_and_a_remedy_that_helps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), Opaque())
    with pytest.raises(RoleError, match=r"'2' \(Opaque\) owns the buffer 'mean'.*scale") as refused:
        FedBN(model)
    heed(refused.value, Opaque)
    assert FedBN(model).plan.keys(Role.CONSTANT) == ("2.mean", "2.std")


@pytest.mark.parametrize("raised", [RuntimeError("boom"), ValueError(), KeyError("x"), RecursionError(), MemoryError()])
def test_what_a_strangers_model_raises_becomes_a_reason(raised: Exception) -> None:
    class Raises(Normalize):
        def forward(self, x: Tensor) -> Tensor:
            raise raised from (None if x is None else ValueError("of theirs"))

    with pytest.raises(RoleError, match=type(raised).__name__):
        FedAvg(small(Raises()))


def test_buffers_outside_the_state_dict_are_no_entries_unless_training_keeps_writing_them() -> None:
    assert "0.mean" not in FedAvg(small(Normalize(persistent=False))).plan.by_key
    with pytest.raises(RoleError, match=r"'state'.*leaves out.*persistent=True") as refused:
        FedAvg(small(Stateful("in place", persistent=False)))
    heed(refused.value, Stateful)
    assert FedAvg(small(Stateful("in place", persistent=False))).plan.keys(Role.CONSTANT) == ("0.table",)

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("grid", torch.zeros(0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.grid.shape != x.shape[-1:]:
                self.grid = torch.arange(x.shape[-1], dtype=x.dtype)
            return x + self.grid

    assert FedAvg(small(Cache())).plan.keys(Role.CONSTANT) == ()


# What users declare ---------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Divides by the mean size over channels; no card speaks for it, and its name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.g.view(-1, *(1,) * (x.ndim - 2)) + 1
        return x / (x.abs().mean(1, keepdim=True) + 1e-6) * scale


class Child(Scaled):
    """A descendant."""


def test_a_declaration_is_the_last_word_and_holds_for_descendants() -> None:
    fednorm.declare_tensors(Scaled, g="scale")
    assert FedBN(nn.Sequential(nn.Linear(4, 4), Child())).plan.local == ("1.g",)
    fednorm.declare_tensors(Child, g="weight")
    assert declared_tensors(Scaled) == {"g": Kind.SCALE}
    rule = RoleRule({Kind.SCALE: Role.LOCAL})
    assert norm_plan(nn.Sequential(Scaled(), Child()), rule).local == ("0.g",)


def test_mistakes_in_declarations() -> None:
    with pytest.raises(UnknownNameError, match=r"'konstant'.*'constant'"):
        fednorm.declare_tensors(Scaled, g="konstant")
    with pytest.raises(ConfigError, match=r"takes a class.*got Scaled"):
        fednorm.declare_tensors(Scaled(), g="scale")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Say what a tensor of Scaled is"):
        fednorm.declare_tensors(Scaled)
    assert declared_tensors(Scaled) == {}


def head(name: str) -> nn.Module:
    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))

    return type(name, (nn.Module,), {"__init__": init, "forward": forward})()


@pytest.mark.parametrize("name", ["NormedLinear", "CosineLinear", "WeightNormHead", "batch_norm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_class_is_not_judged_by_its_name(name: str, strategy: type[FedAvg]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(name))
    assert strategy(model).plan.by_key["4.weight"].kind is Kind.WEIGHT


class NormLike(nn.Module):
    """Scales each channel, as LayerScale does; its name contains norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def test_a_layer_that_normalizes_is_asked_about_where_that_matters_and_the_remedy_helps() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Scaled(), NormLike())
    assert FedAvg(model).plan.by_key["2.g"].kind is Kind.WEIGHT
    assert SiloBN(model).plan.by_key["2.g"].role is Role.SHARED
    with pytest.raises(RoleError, match=r"'2' \(Scaled\) owns the parameter 'g'.*seems to normalize") as refused:
        FedBN(model)
    heed(refused.value, Scaled)
    plan = FedBN(model).plan
    assert plan.by_key["2.g"].role is Role.LOCAL
    assert plan.by_key["3.gamma"].role is Role.SHARED


# Checked to be equal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda t: t, True),
        (lambda t: t * (1 + 1e-6), True),
        (lambda t: t * 1.01, False),
        (lambda t: t.flip(0), False),
        (lambda t: torch.zeros_like(t), False),
    ],
)
def test_prints_tell_constants_apart(change: Callable[[Tensor], Tensor], same: bool) -> None:
    layer = Normalize()
    layer.mean = torch.tensor([0.1, 0.5, 0.7]).view(3, 1, 1)
    model = small(layer)
    plan = FedAvg(model).plan
    own = constant_prints(model, plan)
    assert own["0.std"][1] == pytest.approx(0.2 * 3**0.5)
    layer.mean = change(layer.mean)
    assert differing(own, constant_prints(model, plan)) == ("" if same else "0.mean")
    assert differing(own, {}) == "0.mean"
    assert differing(own, dict.fromkeys(own, "x")) == "0.mean"


def test_a_client_with_another_constant_is_rejected_by_name() -> None:
    def model_of(partition_id: int) -> nn.Module:
        model = small(Normalize())
        if partition_id == 1:
            model[0].mean += 0.1
        return model

    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: object) -> Message:
        partition_id = int(context.node_config["partition-id"])  # type: ignore[attr-defined]
        about = ConfigRecord({"partition-id": partition_id, "domain": "d", "held-out": False})
        prints = constant_prints(model_of(partition_id), strategy.plan)
        return Message(RecordDict({"client": about, "constants": MetricRecord(dict(prints))}), reply_to=message)

    @app.train()
    def train(message: Message, _: object) -> Message:
        arrays: ArrayRecord = message.content.array_records["arrays"]
        assert not {"0.mean", "0.std"} & set(arrays)
        metrics = MetricRecord({"num-examples": 1, "loss": 0.0, "accuracy": 0.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    strategy = FedAvg(small(Normalize()), min_nodes=2)
    grid = InProcessGrid(app, 2, {})
    arrays = strategy.initial_arrays(small(Normalize()))
    _, _ = strategy.aggregate_train(1, grid.send_and_receive(strategy.configure_train(1, arrays, ConfigRecord(), grid)))
    assert [report.partition_id for report in strategy.report.train] == [0]
    [(partition_id, reason)] = strategy.report.rejected
    assert partition_id == 1
    assert "the constant 0.mean" in reason
