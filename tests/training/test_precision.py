from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fednorm.config import resolve
from fednorm.federation.workbench import Workbench
from fednorm.training import precision
from fednorm.training.precision import bf16_advice, operations

ABLE = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def test_operations_are_counted_by_hand() -> None:
    model, before = net(), torch.random.get_rng_state()
    assert operations(model, 6) == 6 * (36 * 4 * 27 + 144 * 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("batch_size", "told"), [(1, True), (32, False)])
def test_a_network_that_uses_its_weights_seldom_is_told(
    batch_size: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: ABLE)
    uses = batch_size * operations(net(), 6) / sum(p.numel() for p in net().parameters())
    assert (uses < precision.LEAST_USES) is told
    advice = bf16_advice(net(), image_size=6, batch_size=batch_size)
    assert (f"for {uses:.0f} operations" in advice) is told
    assert bool(advice) is told


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64"}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_a_cpu_that_emulates_bfloat16_is_told(
    features: dict[str, Any], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: features)
    advice = bf16_advice(net(), image_size=6, batch_size=64)
    assert ("neither AVX512-BF16 nor AMX" in advice) is told


def test_a_strangers_network_that_takes_other_input_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: ABLE)
    assert bf16_advice(nn.Linear(7, 2), image_size=6, batch_size=1) == ""


def test_a_run_says_so_before_it_trains_and_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: {"architecture": "x86_64"})
    small = {"data": {"train_per_client": 8, "test_per_domain": 4}, "model": {"width": 4}}
    told = [Workbench(resolve({**small, "amp": amp})).about_model["notes"] for amp in ("none", "bf16")]
    assert told[0] == []
    assert [note.startswith("amp is bf16") for note in told[1]] == [True]
