"""Norms with state, in the middle of their training: saved, copied and resumed to the same bits, in both layouts."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.norms import make_norm

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "batch_channel_norm": ("batch_channel_norm", {}),
    "batch_channel_norm-estimate": ("batch_channel_norm", {"statistics": "estimate", "moving_speed": 0.3}),
    "hybrid_bn": ("hybrid_bn", {}),
    "power_norm": ("power_norm", {"warmup_iters": 3, "num_groups": 2}),
    "power_norm-running": ("power_norm", {"warmup_iters": 3, "backward_scale": "running"}),
    "region_norm": ("region_norm", {"threshold": 0.5}),
    "region_norm-sample": ("region_norm", {"over": "sample", "threshold": 0.5}),
    "unified_norm": ("unified_norm", {"warmup_iters": 3, "window": 2, "backward_window": 3}),
}
every_case = pytest.mark.parametrize("case", CASES)
SHAPES = [(5, 6), (3, 6, 4), (3, 6, 4, 5)]


def layer_for(case: str, spatial_dims: int = 2) -> nn.Module:
    name, options = CASES[case]
    torch.manual_seed(0)
    layer = make_norm(name, options).layer(6, spatial_dims)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def step(layer: nn.Module, number: int, shape: tuple[int, ...], *, last: bool = False) -> tuple[Tensor, ...]:
    """Train a layer for one batch; return the output, the gradients and every tensor of the state."""
    generator = torch.Generator().manual_seed(number)
    x, gy = (torch.randn(shape, generator=generator) * (1 + number) for _ in range(2))
    if last:
        x, gy = (tensor.to(memory_format=torch.channels_last) for tensor in (x, gy))
    x.requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gy)
    if last:
        assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-3)
    assert x.grad is not None
    return y.detach(), x.grad, *(tensor.clone() for tensor in layer.state_dict().values())


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_goes_on_to_the_same_bits_from_its_state(case: str, shape: tuple[int, ...]) -> None:
    layer = layer_for(case, len(shape) - 2)
    for number in range(5):
        step(layer, number, shape)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = layer_for(case, len(shape) - 2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    clones = [fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    wanted = [step(layer, number, shape) for number in range(5, 8)]
    for clone in clones:
        assert all(same(step(clone, 5 + place, shape), right) for place, right in enumerate(wanted))
        x = torch.randn(shape)
        assert torch.equal(clone.eval()(x), layer.eval()(x))
        layer.train()


@every_case
def test_channels_last_stays_and_gives_the_same(case: str) -> None:
    one, other = layer_for(case), layer_for(case)
    for number in range(6):
        found = step(one, number, (3, 6, 4, 5), last=True)
        for ours, right in zip(found, step(other, number, (3, 6, 4, 5)), strict=True):
            torch.testing.assert_close(ours, right, rtol=2e-4, atol=2e-4)
    x = torch.randn(3, 6, 4, 5).to(memory_format=torch.channels_last)
    y = one.eval()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, other.eval()(x.contiguous()), rtol=2e-4, atol=2e-4)


@every_case
def test_a_batch_of_one_map_works(case: str) -> None:
    layer = layer_for(case)
    assert all(tensor.isfinite().all() for tensor in step(layer, 0, (1, 6, 4, 5)))
    assert layer.eval()(torch.randn(1, 6, 4, 5)).isfinite().all()


@pytest.mark.slow
@every_case
def test_an_exported_layer_evaluates_the_same(case: str) -> None:
    layer = layer_for(case)
    step(layer, 0, (3, 6, 4, 5))
    x = torch.randn(3, 6, 4, 5)
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own
@every_case
def test_a_compiled_layer_trains_the_same(case: str) -> None:
    layer, other = layer_for(case), layer_for(case)
    compiled = torch.compile(layer, backend="aot_eager")
    for number in range(4):
        for ours, right in zip(step(compiled, number, (3, 6, 4, 5)), step(other, number, (3, 6, 4, 5)), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
