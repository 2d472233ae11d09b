"""What is measured of every norm: beside which layer of PyTorch's, on which tensors, and what is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.bench import norms
from fednorm.bench.layers import LayerPass
from fednorm.bench.norms import bench_norms, made_pass, norms_table, peak_bytes, place_on_maps, place_on_tokens
from fednorm.cards import NORMS
from fednorm.errors import ConfigError, UnknownNameError
from fednorm.norms import make_norm
from fednorm.spec import Norm


def test_each_method_stands_beside_what_pytorch_would_have_there() -> None:
    bases = {name: (place := place_on_maps(make_norm(name))) and place.base for name in ("batch_norm", "sws", "none")}
    assert bases == {"batch_norm": "nn.BatchNorm2d", "sws": "nn.Conv2d, nn.BatchNorm2d", "none": None}
    place = place_on_tokens(make_norm("layer_norm", {"over": "channels"}))
    assert place is not None
    assert place.base == "nn.LayerNorm"
    x = torch.randn(3, *norms.TOKENS)
    torch.testing.assert_close(place.module()(x), place.plain()(x), rtol=1e-5, atol=1e-5)
    assert place_on_tokens(make_norm("sws")) is None


def test_maps_are_in_the_layout_of_training_and_tokens_as_a_transformer_has_them() -> None:
    step = made_pass(lambda: nn.BatchNorm2d(norms.MAPS[0]), (2, *norms.MAPS))
    assert step.x.is_contiguous(memory_format=torch.channels_last)
    assert made_pass(lambda: nn.LayerNorm(norms.TOKENS[1]), (2, *norms.TOKENS)).x.shape == (2, *norms.TOKENS)


class Doubled(nn.Module):
    """x + x: its output, and the gradients of both terms, which are one tensor of the same size."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Wasteful(nn.Module):
    """Doubled, with three more tensors at a time that nothing needs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            kept = [x.detach().clone() for _ in range(3)]
        return x + x + 0.0 * float(kept[0].view(-1)[0])


def test_peak_is_the_most_that_is_allocated_at_a_time() -> None:
    x = torch.randn(1000, 250)
    size = x.numel() * 4

    def peak(layer: nn.Module) -> int:
        return peak_bytes(LayerPass(layer, x.clone(), torch.ones_like(x), torch.zeros(1000, dtype=torch.int64)))

    assert size <= peak(Doubled()) <= 3.1 * size
    assert 3 * size <= peak(Wasteful()) <= 5.1 * size


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "BATCHES", (2,))
    monkeypatch.setattr(norms, "MAPS", (8, 4, 4))
    monkeypatch.setattr(norms, "TOKENS", (5, 8))
    kinds = {"maps": ((8, 4, 4), place_on_maps), "tokens": ((5, 8), place_on_tokens)}
    monkeypatch.setattr(norms, "KINDS", kinds)


@pytest.mark.usefixtures("small")
def test_document_has_ratios_to_the_base_of_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {nn.BatchNorm2d: 2.0, nn.Sequential: 8.0, nn.LayerNorm: 4.0}

    def seconds(step: Any) -> float:
        if isinstance(step.layer, norms.OfTokens):
            return 6.0
        sws = isinstance(step.layer, nn.Sequential) and type(step.layer[0]) is not nn.Conv2d
        return 10.0 if sws else cost.get(type(step.layer), 5.0)

    monkeypatch.setattr(norms, "fastest_pass", seconds)
    monkeypatch.setattr(norms, "peak_bytes", lambda step: int(100 * seconds(step)))
    lines: list[str] = []
    result = bench_norms(["layer_norm", "sws", "none"], 1, on_line=lines.append)
    assert json.loads(json.dumps(result)) == result
    maps, tokens = result["cases"]
    assert (maps["kind"], maps["batch"], maps["shape"]) == ("maps", 2, [2, 8, 4, 4])
    assert maps["norms"]["layer_norm"] == {
        "base": "nn.BatchNorm2d", "cpu_ms": 5000.0, "peak_bytes": 500, "time_ratio": 2.5, "memory_ratio": 2.5,
    }  # fmt: skip
    assert maps["norms"]["sws"]["time_ratio"] == 10 / 8
    assert list(tokens["norms"]) == ["layer_norm"]
    assert tokens["norms"]["layer_norm"]["time_ratio"] == 1.5
    assert tokens["bases"]["nn.LayerNorm"]["cpu_ms"] == 4000.0
    assert [line.partition(":")[0] for line in lines] == ["maps, batch 2", "tokens, batch 2"]
    table = norms_table(result)
    assert table.columns == ("norm", "maps, batch 2", "tokens, batch 2")
    assert table.rows == (("layer_norm", "2.50× 2.50×", "1.50× 1.50×"), ("sws", "1.25× 1.25×", "–"))
    assert "Beside nn.Conv2d, nn.BatchNorm2d: sws." in table.notes
    assert "More than 2 × the time of its base somewhere: layer_norm." in table.notes


class Refusing(Norm):
    """A method that takes no maps."""

    def layer(self, num_channels: int, spatial_dims: int) -> nn.Module:
        if spatial_dims == 2:
            raise ConfigError("refusing needs tokens: take model vit.")
        return nn.LayerNorm(num_channels) if not spatial_dims else nn.BatchNorm1d(num_channels)


@pytest.mark.usefixtures("small")
def test_what_a_method_refuses_is_told_with_the_reason() -> None:
    case = norms.measure("maps", 2, {"refusing": Refusing(), "batch_norm": make_norm("batch_norm")}, 1)
    assert case["refused"] == {"refusing": "refusing needs tokens: take model vit."}
    assert list(case["norms"]) == ["batch_norm"]
    assert case["norms"]["batch_norm"]["memory_ratio"] == 1.0


@pytest.mark.usefixtures("small")
def test_every_registered_norm_is_measured_or_refuses_in_words() -> None:
    result = bench_norms(NORMS.names, 1)
    for case in result["cases"]:
        assert all(cost["cpu_ms"] > 0 and cost["peak_bytes"] > 0 for cost in case["norms"].values())
        assert all(reason for reason in case["refused"].values())
        place_of = norms.KINDS[case["kind"]][1]
        made = {name: NORMS[name].made() for name in NORMS.names if name not in case["refused"]}
        assert set(case["norms"]) == {name for name, norm in made.items() if place_of(norm) is not None}


def test_mistakes_are_told_in_words() -> None:
    with pytest.raises(ConfigError, match="repeats must be at least 1; got 0"):
        bench_norms(["batch_norm"], 0)
    with pytest.raises(UnknownNameError, match="Did you mean 'batch_norm'"):
        bench_norms(["bach_norm"], 1)
