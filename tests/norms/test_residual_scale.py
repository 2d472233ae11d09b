"""Residual scaling: every sum written out, the plain network where lambda is 1, the variance of the residual stream."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fednorm
from fednorm.conversion import convert, convert_with_report
from fednorm.errors import ConfigError
from fednorm.federation.plan import norm_plan
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.residual_scale import ScaledResidual
from fednorm.roles import Kind, RoleRule

BRANCHES = {"resnet18": 8, "mobilenet_v2": 10, "vit": 6}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(name: str, norm: str = "residual_scale", **options: Any) -> nn.Module:
    own = {"depth": 3} if name == "vit" else {}
    width = {"resnet18": 4, "mobilenet_v2": 32, "vit": 8}[name]
    return make_model(name, make_norm(norm, options), num_classes=5, image_size=16, width=width, options=own)


def sums(model: nn.Module) -> list[ScaledResidual]:
    return [module for module in model.modules() if isinstance(module, ScaledResidual)]


@pytest.mark.parametrize("name", BRANCHES)
def test_the_scale_is_that_of_the_number_of_branches(name: str) -> None:
    n = BRANCHES[name]
    wanted = {"1": 1.0, "1/sqrt(n)": n**-0.5, "1/n": 1 / n, 0.3: 0.3, 2: 2.0}
    for scale, value in wanted.items():
        assert [module.scale for module in sums(network(name, scale=scale))] == pytest.approx([value] * n)
    learned = sums(network(name, scale="skipinit"))
    assert len(learned) == n
    assert all(module.skip_gain is not None and module.skip_gain.item() == 0 for module in learned)


def test_narrow_mobilenets_count_the_branches_that_they_have() -> None:
    model = make_model("mobilenet_v2", make_norm("residual_scale", {"scale": "1/n"}), num_classes=2, width=8)
    assert {module.scale for module in sums(model)} == {1 / len(sums(model))}
    assert len(sums(model)) > BRANCHES["mobilenet_v2"]


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("beside", ["none", "batch_norm", "layer_norm"])
def test_a_scale_of_1_is_the_network_without_it_to_the_last_bit(name: str, beside: str) -> None:
    ours, plain = network(name, scale="1", beside=beside), network(name, beside)
    x = gaussian(3, 3, 16, 16)
    assert list(ours.state_dict()) == list(plain.state_dict())
    one, other = ours(x), plain(x)
    assert torch.equal(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]


def test_a_resnet_block_computes_the_formula() -> None:
    model = network("resnet18", scale="1/n").double()
    block, h = model.get_submodule("layer2.0"), gaussian(2, 4, 6, 6).double()
    branch = block.conv2(block.conv1(h).relu())  # type: ignore[operator]
    torch.testing.assert_close(block(h), (block.downsample(h) + branch / 8).relu())  # type: ignore[operator]


def test_a_transformer_block_computes_the_formula_with_a_learned_number() -> None:
    model = network("vit", scale="skipinit", beside="rms_norm").double()
    block, h = model.get_submodule("blocks.1"), gaussian(2, 16, 8).double()
    assert torch.equal(block(h), h)  # starts as the identity
    block.residual1.skip_gain.data.fill_(0.3)  # type: ignore[union-attr, operator]
    block.residual2.skip_gain.data.fill_(-2.0)  # type: ignore[union-attr, operator]

    def rms(x: Tensor, layer: Any) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight

    inner = h + 0.3 * block.attn(rms(h, block.norm1))  # type: ignore[operator]
    torch.testing.assert_close(block(h), inner - 2.0 * block.mlp(rms(inner, block.norm2)))  # type: ignore[operator]
    block(h).square().sum().backward()
    assert block.residual1.skip_gain.grad.abs() > 0  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("scale", "growth"), [("1", 2.0**16), ("1/sqrt(n)", (1 + 1 / 16) ** 16), ("1/n", (1 + 1 / 256) ** 16)]
)
def test_the_residual_streams_variance_grows_as_it_should(scale: str, growth: float) -> None:
    """With branches that keep variance and are independent of the stream, a sum multiplies it by 1 + lambda²."""
    torch.manual_seed(0)
    norm, h = make_norm("residual_scale", {"scale": scale}), gaussian(256, 512)
    before = h.var().item()
    for _ in range(16):
        h = norm.residual(16)(h, h @ (torch.randn(512, 512) / math.sqrt(512)))  # type: ignore[misc]
    assert h.var().item() / before == pytest.approx(growth, rel=0.15)


def test_its_learned_numbers_are_weights_in_a_federation() -> None:
    plan = norm_plan(network("resnet18", scale="skipinit", beside="batch_norm"), RoleRule())
    entries = [entry for entry in plan.entries if entry.key.endswith("skip_gain")]
    assert len(entries) == 8
    assert {(entry.kind, entry.norm) for entry in entries} == {(Kind.WEIGHT, "residual_scale")}


def test_what_the_norm_beside_brings_is_there_too() -> None:
    selu = network("resnet18", beside="selu")
    assert [type(m) for m in selu.modules() if isinstance(m, nn.ReLU | nn.SELU)] == [nn.SELU] * 17
    assert selu.get_parameter("layer4.1.conv2.weight").std().item() == pytest.approx((32 * 9) ** -0.5, rel=0.03)
    attention = network("vit", beside="affine_scaled_attention")
    assert len([key for key in attention.state_dict() if key.endswith("alpha_ma")]) == 3
    fitted = make_norm("residual_scale", {"beside": "task_balanced_norm"}).for_stream(num_tasks=2, batch_ratio=3)
    assert fitted.layer(4, 2).batch_ratio == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": "1/2"}, r"scale must be one of 1, 1/sqrt\(n\), 1/n, skipinit or a number greater than 0; got '1/2'"),
        ({"scale": 0}, r"residual_scale.scale must be greater than 0; got 0"),
        ({"scale": True}, r"residual_scale.scale must be a finite number; got True"),
        ({"beside": "sws"}, r"norm sws scales the residual branches itself.*Take norm sws alone"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_norm("residual_scale", options)


@pytest.mark.few(2)
@pytest.mark.parametrize("model", ["digits_cnn", "mlp", "alexnet"])
def test_a_network_without_branches_is_refused_with_the_remedy(model: str) -> None:
    with pytest.raises(ConfigError, match=r"has no residual sum that it could scale.*--model resnet18"):
        make_model(model, make_norm("residual_scale"), num_classes=3, image_size=64)


def test_converting_our_networks_replaces_their_sums_and_back() -> None:
    plain = network("resnet18", "batch_norm")
    converted, report = convert_with_report(plain, "residual_scale", beside="batch_norm", scale="1/n")
    assert report.residuals == [f"layer{s}.{b}.residual" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert {module.scale for module in sums(converted)} == {1 / 8}
    x = gaussian(3, 3, 16, 16)
    assert not torch.allclose(converted.eval()(x), plain.eval()(x))
    back = convert(converted, "batch_norm")
    assert not sums(back)
    torch.testing.assert_close(back(x), plain(x))


def test_a_foreign_networks_sums_cannot_be_seen() -> None:
    import torchvision

    with pytest.raises(ConfigError, match=r"ResNet has no residual sum that it could scale \(where a foreign network"):
        convert(torchvision.models.resnet18(num_classes=2), "residual_scale", beside="batch_norm")


@pytest.mark.few(1)
@pytest.mark.parametrize("scale", ["skipinit", 0.5])
def test_both_worlds_train_it(scale: str | float) -> None:
    options = {"scale": scale, "beside": "batch_norm"}
    common = {"model": {"width": 4}, "norm": options, "train": {"batch_size": 6}}
    result = fednorm.federated(
        model="resnet18", norm="residual_scale", rounds=1,
        config={**common, "data": {"image_size": 8, "train_per_client": 12, "test_per_domain": 6}},
    )  # fmt: skip
    assert result["config"]["norm"] == {"name": "residual_scale", **options}
    scenario = {"num_experiences": 2, "train_per_experience": 12, "test_per_experience": 6}
    stream = fednorm.continual(
        model="resnet18", norm="residual_scale", learner="naive",
        config={**common, "data": {"image_size": 8}, "scenario": scenario},
    )  # fmt: skip
    assert [len(row) for row in stream["accuracy_matrix"]] == [2, 2]
