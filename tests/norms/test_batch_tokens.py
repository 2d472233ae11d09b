"""Batch normalization of a transformer's tokens: by the kernel for rows, with the numbers of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.norms import make_norm
from fednorm.norms._batch import as_rows, batch_norm, from_rows, scaled_by, scaled_by_backward

METHODS = ("batch_norm", "batch_norm_corrected", "batch_renorm", "hybrid_bn", "batch_channel_norm", "unified_norm")


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return tokens (N, L, C), seen with their features first."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    return drawn.to(dtype).transpose(1, 2)


def test_only_tokens_whose_features_stand_side_by_side_are_rows() -> None:
    seen = tokens(3, 5, 4)
    rows = as_rows(seen)
    assert rows is not None
    assert rows.data_ptr() == seen.data_ptr()
    assert torch.equal(rows[5 * 1 + 2], seen[1, :, 2])
    assert torch.equal(from_rows(rows, seen), seen)
    assert from_rows(rows, seen).stride() == seen.stride()
    for other in (seen.contiguous(), seen[:, :2], torch.zeros(3, 4), torch.zeros(3, 4, 5, 5), torch.zeros(3, 1, 5)):
        assert as_rows(other) is None


@pytest.mark.parametrize("layout", ["tokens", "sequences", "one for all"])
def test_values_and_gradients_are_the_formulas(layout: str) -> None:
    """Whatever the layout of the gradient: PyTorch's backward pass has been wrong where it was another."""
    x, gy = tokens(3, 5, 4).requires_grad_(), tokens(3, 5, 4, seed=2)
    gy = {"tokens": gy, "sequences": gy.contiguous(), "one for all": gy[:1, :, :1].expand(3, 4, 5)}[layout]
    weight, bias = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y = batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
    m, v = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
    expected = (x - m) / (v + 1e-5).sqrt() * weight.view(1, -1, 1) + bias.view(1, -1, 1)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, 0.1 * m.detach().flatten())
    torch.testing.assert_close(var, 0.9 + 0.1 * v.detach().flatten() * 15 / 14)
    found = torch.autograd.grad(y, (x, weight, bias), gy)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight, bias), gy))
    # With given moments, which are constants.
    given = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    fixed = scaled_by(x, *given, weight, bias, 1e-5)
    grads = torch.autograd.grad(fixed, (x, weight, bias), gy)
    with torch.no_grad():
        torch.testing.assert_close(scaled_by_backward(gy, x, *given, weight, 1e-5), grads)


@pytest.mark.parametrize("name", METHODS)
def test_the_layout_changes_no_number(name: str) -> None:
    """Maps, plain sequences and tokens are one and the same function."""

    weights = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def trained(x: Tensor) -> list[Tensor]:
        layer: Any = make_norm(name).token_layer(4).double()
        results = []
        for number in range(3):
            given = (x + 0.1 * number).detach().requires_grad_()
            y = layer.train()(given)
            results += [y, *torch.autograd.grad((y * weights).sum(), given)]
        return [*results, layer.eval()(x), *layer.state_dict().values()]

    seen = tokens(6, 5, 4)
    for one, other in zip(trained(seen), trained(seen.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


def test_a_vits_batch_norm_is_pytorchs() -> None:
    layer, plain = make_norm("batch_norm").token_layer(4), nn.BatchNorm1d(4)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = tokens(6, 5, 4, dtype=torch.float32)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer(x).stride() == x.stride()
