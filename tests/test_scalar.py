"""Numbers as tensors: operations with them have the bits of those with numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fednorm import scalar as module
from fednorm.scalar import scalar

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@settings(deadline=None, max_examples=60)
@given(value=st.floats(-1e4, 1e4), length=st.integers(1, 40), seed=st.integers(0, 9))
def test_operations_have_the_bits_of_the_number(dtype: torch.dtype, value: float, length: int, seed: int) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(dtype)
    made = scalar(value, x)
    for ours, plain in (
        (x * made, x * value),
        (x.clone().mul_(made), x.clone().mul_(value)),
        (x / made, x / value),
        (x + made, x + value),
        (torch.where(x >= made, x, made), torch.where(x >= value, x, value)),
        (torch.lerp(x, x * x, made), torch.lerp(x, x * x, value)),
    ):
        assert ours.dtype == dtype
        assert torch.equal(ours.nan_to_num(), plain.nan_to_num())
        assert torch.equal(ours.isnan(), plain.isnan())


def test_it_is_made_once_for_a_type() -> None:
    x = torch.ones(3)
    assert scalar(0.5, x) is scalar(0.5, nn.Parameter(x))
    wide = scalar(0.5, x.double())
    assert isinstance(wide, Tensor)
    assert wide.dtype == torch.float64


def test_one_made_in_inference_mode_can_be_learned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MADE", {})
    with torch.inference_mode():
        scalar(3.0, torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    (x * scalar(3.0, x)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0]


def test_fake_tensors_get_the_number_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MADE", {})
    with FakeTensorMode():
        assert scalar(0.5, torch.ones(2)) == 0.5
    assert module._MADE == {}


def test_no_more_than_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MADE", {})
    monkeypatch.setattr(module, "MOST", 3)
    for value in range(10):
        scalar(float(value), torch.ones(1))
    assert 1 <= len(module._MADE) <= 3
