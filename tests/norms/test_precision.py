"""Every norm in half precision, by autocast and by conversion: statistics in float32, values near the float32 ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.cards import NORMS
from fednorm.norms import make_norm
from fednorm.spec import HookedLayer

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "l1_norm": [{}, {"over": "sample"}, {"over": "channels"}],
    "nap": [{}, {"statistics": "rms_norm"}, {"over": "channels"}],
    "rms_norm": [{}, {"over": "channels"}],
    "batch_channel_norm": [{}, {"statistics": "estimate", "moving_speed": 0.5}],
    "power_norm": [{}, {"warmup_iters": 0, "num_groups": 2}],
    "region_norm": [{}, {"over": "sample"}],
    "unified_norm": [{}, {"warmup_iters": 0, "window": 2}],
    "layer_norm": [{}, {"over": "channels"}],
    "adab2n": [{}, {"corrected": True}],
    "task_balanced_norm": [{"batch_ratio": 1}],
}
CASES = [(name, options) for name in NORMS.names for options in OPTIONS.get(name, [{}])]
every_norm = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)


def tell(model: nn.Module, count: int = 8) -> None:
    tasks = torch.tensor([1] * (count // 2) + [0] * (count // 4) + [1] * (count // 4))
    for layer in model.modules():
        if isinstance(layer, HookedLayer):
            layer.set_tasks(tasks, 2)


def network(name: str, options: dict[str, Any]) -> nn.Module:
    norm = make_norm(name, options)
    torch.manual_seed(0)
    return nn.Sequential(
        norm.conv(3, 8, 3, padding=1), norm.layer(8, 2), norm.activation(), norm.conv(8, 8, 3, padding=1),
        norm.layer(8, 2), norm.activation(), nn.Flatten(), nn.Linear(8 * 36, 12), norm.layer(12, 0), nn.ReLU(),
        nn.Linear(12, 5),
    )  # fmt: skip


def images(seed: int, *, last: bool) -> Tensor:
    drawn = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last) if last else drawn


@pytest.mark.cover(1)
@every_norm
@pytest.mark.parametrize(
    ("low", "how", "last"),
    [("bfloat16", "autocast", False), ("bfloat16", "converted", True), ("float16", "autocast", True),
     ("float16", "converted", False)],
)  # fmt: skip
def test_a_network_trains_in_half_precision(name: str, options: dict[str, Any], low: str, how: str, last: bool) -> None:
    """Two steps of training and an evaluation, beside the same in float32."""
    dtype, rounding = LOW[low], torch.finfo(LOW[low]).eps
    ours, plain = network(name, options), network(name, options)
    if how == "converted":
        ours.to(dtype)
    for step in range(2):
        x = images(step, last=last)
        tell(ours)
        tell(plain)
        expected = plain(x)
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            found = ours(x if how == "autocast" else x.to(dtype))
        assert found.dtype == dtype
        gap = (found.detach().float() - expected.detach()).abs().max() / expected.detach().abs().max()
        assert float(gap) < 6 * rounding
        for logits, model in ((found, ours), (expected, plain)):
            loss = nn.functional.cross_entropy(logits.float(), torch.arange(8) % 5)
            loss = loss + sum(
                p for m in model.modules() if isinstance(m, HookedLayer) and (p := m.penalty()) is not None
            )
            loss.backward()
    grads = [torch.cat([g.float().flatten() for p in model.parameters() if (g := p.grad) is not None])
             for model in (ours, plain)]  # fmt: skip
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.3  # a rounding decides which side of a ReLU
    for (key, one), (_, other) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
        assert one.dtype == (dtype if how == "converted" and other.is_floating_point() else other.dtype)
        torch.testing.assert_close(one.to(other.dtype), other, rtol=6 * rounding, atol=6 * rounding, msg=key)
    ours.eval()
    plain.eval()
    x = images(3, last=last)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=how == "autocast"):
        found = ours(x if how == "autocast" else x.to(dtype))
    expected = plain(x).detach()
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < 8 * rounding


LAYERS = [(name, options) for name, options in CASES if NORMS[name].normalizes]


@pytest.mark.parametrize(
    ("name", "options"), LAYERS, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("low", LOW)
def test_statistics_are_of_float32(name: str, options: dict[str, Any], offset: float, low: str) -> None:
    """Of one and the same input a layer makes in half precision what it makes in float32, but for the last rounding.

    With a mean far from 0, squares in half precision have no digit left; over 64 x 32 x 32 values a float16 sum of
    squares is infinite.
    """
    dtype, rounding = LOW[low], torch.finfo(LOW[low]).eps
    if name == "continual_norm":
        rounding *= 4  # its first half's output is rounded, and then divided by a deviation
    x = (torch.randn(4, 64, 32, 32, generator=torch.Generator().manual_seed(1)) + offset).to(dtype)
    one = make_norm(name, options).layer(64, 2)
    other = copy.deepcopy(one)  # a layer's initial values may be drawn
    tell(one, 4)
    tell(other, 4)
    with torch.autocast("cpu", dtype):
        found = one(x)
    expected = other(x.float())
    assert found.dtype == dtype
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=2 * rounding, atol=2 * rounding)
    for (key, buffer), (_, right) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, right, rtol=1e-4, atol=1e-4, msg=key)
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16  # as it was
    assert not torch.is_autocast_enabled("cpu")


@every_norm
def test_single_precision_under_autocast_stays_single(name: str, options: dict[str, Any]) -> None:
    """What is given in float32, as by an operation that autocast leaves alone, comes back in float32, bit for bit."""
    layer = make_norm(name, options).layer(4, 2)
    other = copy.deepcopy(layer)
    x = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    tell(layer)
    tell(other)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, other(x))


def test_models_in_double_precision_stay_double() -> None:
    for name, options in LAYERS:
        layer = make_norm(name, options).layer(4, 2).double()
        tell(layer)
        assert layer(torch.randn(8, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64
