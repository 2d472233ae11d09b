"""The norm plan: every entry of a state dict has the kind its layer's type declares, or is refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fednorm.conversion.replacement import convert
from fednorm.errors import RoleError
from fednorm.federation.plan import NormPlan, norm_plan
from fednorm.norms import make_norm
from fednorm.roles import Kind, Role, RoleRule
from strategies.fedavg import FedAvg
from strategies.fedbn import FedBN
from strategies.fedwon import FedWon
from strategies.silobn import SiloBN

BATCH_NORM = {
    "weight": Kind.SCALE,
    "bias": Kind.SHIFT,
    "running_mean": Kind.MEAN,
    "running_var": Kind.VAR,
    "num_batches_tracked": Kind.COUNT,
}


def kinds(plan: NormPlan, layer: str) -> dict[str, Kind]:
    return {e.key.rpartition(".")[2]: e.kind for e in plan.entries if e.layer == layer}


class Block(nn.Module):
    """A residual block whose names say nothing: its shortcut's norm is called ``s.1``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 1)
        self.b = nn.BatchNorm2d(2)
        self.s = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(self.a(x)) + self.s(x))


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Sequential(Block()), nn.GroupNorm(1, 2)), nn.Flatten(), nn.Linear(2, 2))


def test_kinds_come_from_types_three_modules_deep() -> None:
    plan = norm_plan(nested(), RoleRule())
    assert kinds(plan, "0.0.0.s.1") == BATCH_NORM
    assert kinds(plan, "0.0.0.b") == BATCH_NORM
    assert kinds(plan, "0.1") == {"weight": Kind.SCALE, "bias": Kind.SHIFT}
    assert kinds(plan, "0.0.0.a") == {"weight": Kind.WEIGHT, "bias": Kind.WEIGHT}
    assert kinds(plan, "0.0.0.s.0") == {"weight": Kind.WEIGHT}
    assert {e.layer: (e.layer_type, e.norm) for e in plan.entries}["0.0.0.s.1"] == ("BatchNorm2d", "batch_norm")
    assert {e.layer: (e.layer_type, e.norm) for e in plan.entries}["2"] == ("Linear", "")


def test_roles_follow_the_strategy() -> None:
    shared = {"0.0.0.a.weight", "0.0.0.a.bias", "0.0.0.s.0.weight", "2.weight", "2.bias"}
    scales = {f"{layer}.{name}" for layer in ("0.0.0.b", "0.0.0.s.1", "0.1") for name in ("weight", "bias")}
    moments = {f"{layer}.running_{name}" for layer in ("0.0.0.b", "0.0.0.s.1") for name in ("mean", "var")}
    counters = {f"{layer}.num_batches_tracked" for layer in ("0.0.0.b", "0.0.0.s.1")}
    fedbn, silobn, fedavg = FedBN(nested()).plan, SiloBN(nested()).plan, FedAvg(nested()).plan
    assert (set(fedbn.sent), set(fedbn.local)) == (shared, scales | moments | counters)
    assert (set(silobn.sent), set(silobn.local)) == (shared | scales, moments | counters)
    assert (set(fedavg.sent), set(fedavg.local)) == (shared | scales | moments | counters, set())
    pooled = FedAvg(nested(), moments="pool").plan
    assert set(pooled.keys(Role.POOLED)) == moments
    assert set(pooled.sent) == set(fedavg.sent)
    assert set(fedavg.counters) == set(pooled.counters) == counters
    assert fedbn.counters == silobn.counters == ()


def test_resnet18_has_a_hundred_local_entries_where_a_name_test_finds_85() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    plan = FedBN(model).plan
    owned = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for name in module.state_dict()
    ]
    assert list(plan.local) == owned
    assert plan.count(Role.LOCAL) == 100
    by_name = [key for key in model.state_dict() if "bn" in key]
    assert len(by_name) == 85
    assert {key.rpartition(".")[0] for key in set(owned) - set(by_name)} == {
        f"layer{i}.0.downsample.1" for i in (2, 3, 4)
    }


@pytest.mark.parametrize(
    ("make", "normalized"),
    [
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=2), (nn.BatchNorm2d,)),
        (
            lambda: torchvision.models.DenseNet(4, (1, 1), num_init_features=4, bn_size=1, num_classes=2),
            (nn.BatchNorm2d,),
        ),
        (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 8, num_classes=2), (nn.LayerNorm,)),
        (
            lambda: timm.create_model("convnext_atto", num_classes=2, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)),
            (nn.LayerNorm,),
        ),
        (
            lambda: timm.create_model("resnetv2_50", num_classes=2, layers=(1, 1), channels=(8, 8), stem_chs=8),
            (nn.BatchNorm2d,),
        ),
    ],
    ids=["mobilenet_v3_small", "densenet", "vit", "timm convnext", "timm resnetv2"],
)
def test_fedbn_keeps_what_normalization_layers_own_in_networks_that_are_not_ours(
    make: Callable[[], nn.Module], normalized: tuple[type[nn.Module], ...]
) -> None:
    model = make()
    owned = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, normalized)
        for name in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
    }
    plan = FedBN(model).plan
    assert len(owned) >= 4
    assert set(plan.local) == owned
    assert [entry.key for entry in plan.entries] == list(model.state_dict())


def test_timms_fused_norm_and_activation_is_a_batch_norm() -> None:
    model = timm.create_model("mobilenetv3_small_050", num_classes=2)
    fused = [path for path, module in model.named_modules() if type(module).__name__ == "BatchNormAct2d"]
    plan = norm_plan(model, RoleRule())
    assert len(fused) == 34
    assert all(kinds(plan, path) == BATCH_NORM for path in fused)


def test_vits_own_parameters_are_weights() -> None:
    plan = norm_plan(torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 8, num_classes=2), RoleRule())
    by_key = {key: entry.kind for key, entry in plan.by_key.items()}
    assert by_key["class_token"] is by_key["encoder.pos_embedding"] is Kind.WEIGHT
    assert by_key["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] is Kind.WEIGHT
    assert plan.by_key["class_token"].layer == ""


class Renamed(nn.BatchNorm1d):
    """A descendant that adds behaviour and no tensors."""


class WithMemory(nn.BatchNorm1d):
    """A descendant that adds a tensor of unknown kind."""

    def __init__(self) -> None:
        super().__init__(2)
        self.register_buffer("memory", torch.zeros(5, 2))


def test_descendants_and_options_of_batch_norm() -> None:
    assert kinds(norm_plan(nn.Sequential(Renamed(2)), RoleRule()), "0") == BATCH_NORM
    assert set(kinds(norm_plan(nn.Sequential(nn.BatchNorm1d(2, affine=False)), RoleRule()), "0")) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    without = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 1))
    assert FedBN(without).plan.local == ("0.weight", "0.bias")
    with pytest.raises(RoleError, match="SiloBN"):
        SiloBN(without)
    bare = nn.Sequential(nn.BatchNorm1d(2, affine=False, track_running_stats=False), nn.Linear(2, 1))
    with pytest.raises(RoleError, match="FedBN"):
        FedBN(bare)


class Recurrent(nn.Module):
    """A stateful layer that no norm speaks for, in a model that cannot be run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("trace", torch.zeros(3, 7))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Recurrent(), ("1.deep", "Recurrent", "buffer", "'trace'", "(3, 7)", "fednorm.declare_tensors(Recurrent")),
        (WithMemory(), ("1.deep", "WithMemory", "'memory'", "(5, 2)", "'batch_norm'", "running_mean")),
    ],
    ids=["unknown layer", "undeclared tensor"],
)
def test_what_cannot_be_placed_is_refused_by_path_class_and_tensor(layer: nn.Module, words: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"deep": layer}))
    with pytest.raises(RoleError) as refused:
        FedAvg(model)
    assert [word for word in words if word not in str(refused.value)] == []


def test_lazy_layers_are_refused_by_path() -> None:
    with pytest.raises(RoleError, match=r"'1' \(LazyLinear\).*one forward pass") as refused:
        FedAvg(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)))
    assert "shape" in str(refused.value)


def test_a_custom_state_dict_is_refused() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.zeros(1)

    with pytest.raises(RoleError, match=r"0\._extra_state"):
        norm_plan(nn.Sequential(Odd(1, 1)), RoleRule())


def small(norm: str) -> nn.Module:
    return convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), make_norm(norm))


@pytest.mark.parametrize(
    ("strategy", "options", "norm", "words"),
    [
        (FedBN, {}, "none", "FedBN keeps normalization layers local"),
        (FedBN, {}, "sws", "FedBN keeps normalization layers local"),
        (SiloBN, {}, "group_norm", "SiloBN keeps running statistics local"),
        (SiloBN, {}, "sws", "SiloBN keeps running statistics local"),
        (FedAvg, {"moments": "pool"}, "group_norm", "FedAvg with moments='pool' acts on tensors of kind mean, var"),
    ],
)
def test_silent_no_ops_are_refused(strategy: type[FedAvg], options: Mapping[str, str], norm: str, words: str) -> None:
    with pytest.raises(RoleError, match="would silently be FedAvg") as refused:
        strategy(small(norm), **options)
    assert words in str(refused.value)
    assert "strategy 'fedavg'" in str(refused.value)


def test_fedbn_on_group_norm_is_not_a_no_op() -> None:
    assert FedBN(small("group_norm")).plan.count(Role.LOCAL) == 2


def test_fedwon_accepts_standardised_convolutions_only() -> None:
    plan = FedWon(small("sws")).plan
    assert {entry.kind for entry in plan.entries} == {Kind.WEIGHT, Kind.GAIN}
    assert plan.sent == tuple(entry.key for entry in plan.entries)
    with pytest.raises(RoleError, match=r"'1' is a BatchNorm2d \(norm 'batch_norm'\)"):
        FedWon(nn.Sequential(small("sws"), nn.BatchNorm2d(4)))
    with pytest.raises(RoleError, match=r"'0' is a plain Conv2d.*norm 'sws'"):
        FedWon(small("none"))
    with pytest.raises(RoleError, match="GroupNorm"):
        FedWon(small("ws_group_norm"))


def test_non_persistent_buffers_have_no_entry() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.register_buffer("positions", torch.arange(9), persistent=False)

    model = Table()
    assert [entry.key for entry in norm_plan(model, RoleRule()).entries] == list(model.state_dict())


def test_tied_parameters_and_shared_modules_have_an_entry_for_every_key() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model.append(model[2])
    plan = FedBN(model).plan
    assert [entry.key for entry in plan.entries] == list(model.state_dict())
    assert {"0.weight", "1.weight"} <= set(plan.sent)
    assert kinds(plan, "2") == kinds(plan, "3") == BATCH_NORM
    assert list(plan.moments()) == [("2.running_mean", "2.running_var"), ("3.running_mean", "3.running_var")]


def test_layers_whose_entries_are_not_in_order_of_their_modules_keep_the_state_dicts_order() -> None:
    class Reordered(nn.Linear):
        def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, *_: bool, **__: bool) -> None:
            destination[prefix + "bias"] = self.bias
            destination[prefix + "weight"] = self.weight

    model = nn.Sequential(Reordered(2, 2))
    assert [entry.key for entry in norm_plan(model, RoleRule()).entries] == ["0.bias", "0.weight"]


def test_numbers_of_the_summary() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    # Linear: (6 + 2) float32; BatchNorm: 4 times 2 float32 and one int64
    assert FedAvg(model).plan.summary(5) == {
        "shared": 7,
        "local": 0,
        "pooled": 0,
        "reset": 0,
        "bytes_per_round": 2 * 5 * (8 * 4 + 8 * 4 + 8),
    }
    assert FedBN(model).plan.summary(5) == {
        "shared": 2,
        "local": 5,
        "pooled": 0,
        "reset": 0,
        "bytes_per_round": 2 * 5 * 32,
    }
    assert SiloBN(model).plan.summary(1)["bytes_per_round"] == 2 * (32 + 16)
    pooled = FedAvg(model, moments="pool").plan.summary(1)
    assert (pooled["shared"], pooled["pooled"], pooled["bytes_per_round"]) == (5, 2, 2 * 72)


def test_entries_say_shape_type_and_size() -> None:
    entries = norm_plan(nn.Sequential(nn.Conv2d(3, 4, (1, 2)), nn.BatchNorm2d(4)).double(), RoleRule()).by_key
    assert (entries["0.weight"].shape, entries["0.weight"].dtype, entries["0.weight"].nbytes) == (
        (4, 3, 1, 2),
        "float64",
        4 * 3 * 2 * 8,
    )
    counter = entries["1.num_batches_tracked"]
    assert (counter.shape, counter.dtype, counter.nbytes) == ((), "int64", 8)


def test_reset_tensors_are_neither_sent_nor_local() -> None:
    rule = RoleRule({Kind.MEAN: Role.RESET, Kind.VAR: Role.RESET}, why="This rule")
    plan = norm_plan(nested(), rule)
    assert Counter(entry.role for entry in plan.entries) == {Role.SHARED: 13, Role.RESET: 4}
    assert set(plan.keys(Role.RESET)).isdisjoint({*plan.sent, *plan.local})


def test_what_a_record_keeps_of_the_entries() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plan = FedBN(model).plan
    assert [entry["key"] for entry in plan.tensors()] == list(model.state_dict())
    by_key = {entry["key"]: entry for entry in plan.tensors()}
    weight = {"layer": "0", "norm": "", "kind": "weight", "role": "shared", "shape": [4, 3, 1, 1], "bytes": 48}
    assert by_key["0.weight"] == {"key": "0.weight", **weight}
    assert (by_key["1.running_var"]["kind"], by_key["1.running_var"]["role"]) == ("var", "local")
    assert plan.bytes_by_role() == {"shared": 48 + 16, "local": 4 * 16 + 8, "pooled": 0, "reset": 0}


# Every remedy that a refusal names, done ------------------------------------------------------------------------------


def test_the_remedies_of_a_rule_that_would_do_nothing_help() -> None:
    with pytest.raises(RoleError, match=r"fednorm\.convert\(model, 'batch_norm'\); or strategy 'fedavg'") as refused:
        SiloBN(small("group_norm"))
    assert "built with" not in str(refused.value)
    assert SiloBN(convert(small("group_norm"), "batch_norm")).plan.count(Role.LOCAL) == 3
    with pytest.raises(RoleError, match="built with norm 'batch_norm'; or strategy 'fedavg'"):
        FedBN(small("none"))
    assert FedBN(small("batch_norm")).plan.count(Role.LOCAL) == 5
    for norm in ("group_norm", "none"):
        FedAvg(small(norm))


@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_the_remedies_of_fedwon_help(norm: str) -> None:
    with pytest.raises(RoleError, match=r"norm 'sws'.*strategy 'fedavg'"):
        FedWon(small(norm))
    FedWon(convert(small(norm), "sws"))
    FedAvg(small(norm))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d), marks=pytest.mark.slow
        ),
        pytest.param(lambda: timm.layers.freeze_batch_norm_2d(timm.create_model("resnet18")), marks=pytest.mark.slow),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), torchvision.ops.FrozenBatchNorm2d(4), nn.Flatten()),
    ],
    ids=["torchvision", "timm", "sequence"],
)
def test_frozen_batch_norms_are_constants_and_the_way_to_fedbn_ends(make: Callable[[], nn.Module]) -> None:
    model = make()
    plan = FedAvg(model).plan
    frozen = [path for path, module in model.named_modules() if "Frozen" in type(module).__name__]
    assert plan.count(Role.CONSTANT) == 4 * len(frozen) > 0
    with pytest.raises(RoleError, match=r"fednorm\.convert\(model, 'batch_norm'\)"):
        FedBN(model)
    assert FedBN(convert(model, "batch_norm")).plan.count(Role.LOCAL) == 5 * len(frozen)
    assert FedBN(convert(model, "group_norm")).plan.count(Role.LOCAL) == 2 * len(frozen)


def test_the_remedy_of_lazy_layers_helps() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(RoleError, match="one forward pass"):
        FedBN(model)
    model(torch.zeros(2, 3))
    assert FedBN(model).plan.count(Role.LOCAL) == 5


def test_a_stranger_s_norm_has_the_kinds_that_its_card_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layer computes nothing that fednorm would recognize by looking: the card alone says what its tensors are."""
    (tmp_path / "centred_norm.py").write_text(CENTRED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    layer = make_norm("centred_norm:SPEC").layer(3, 2)
    plan = norm_plan(nn.Sequential(nn.Conv2d(1, 3, 1), layer), FedBN.rule)
    assert {entry.key: (entry.norm, entry.kind) for entry in plan.entries if entry.role is Role.LOCAL} == {
        "1.shift": ("centred", Kind.SHIFT)
    }
    ours = norm_plan(nn.Sequential(nn.BatchNorm2d(3)), RoleRule())
    assert {entry.norm for entry in ours.entries} == {"batch_norm"}, "a stranger cannot take a layer that we speak for"


CENTRED = """
from dataclasses import dataclass
import torch
from torch import nn
from fednorm.roles import Kind
from fednorm.spec import Norm, NormSpec, TensorSpec

class Centred(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x - x.mean((1, 2, 3), keepdim=True) + self.shift.view(1, -1, 1, 1)

@dataclass(frozen=True, kw_only=True)
class CentredNorm(Norm):
    def layer(self, num_channels, spatial_dims):
        return Centred(num_channels)

SPEC = NormSpec(
    name="centred", summary="Centres.", make=CentredNorm, layers=(Centred, nn.BatchNorm2d),
    tensors={"shift": TensorSpec(Kind.SHIFT)},
)
"""
