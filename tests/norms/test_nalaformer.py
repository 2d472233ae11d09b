"""Norm-aware linear attention against the official code's formula, written out query by query, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fednorm
from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.nalaformer import NormAwareLinearAttention


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(
    width: int = 8, heads: int = 2, grid: tuple[int, int] = (2, 3), **options: Any
) -> NormAwareLinearAttention:
    torch.manual_seed(0)
    made = make_norm("nalaformer", options).attention(width, heads, grid).double()
    assert isinstance(made, NormAwareLinearAttention)
    for index, parameter in enumerate(made.parameters()):
        parameter.data += 0.5 * gaussian(*parameter.shape, seed=index)
    return made


def turned(features: Tensor, row: int, column: int) -> Tensor:
    """Turn each pair of features as a complex number: the first half by the row, the second by the column."""
    quarter = len(features) // 4
    result = features.clone()
    for pair in range(2 * quarter):
        place = pair % quarter
        speed = 10000 ** (-place / (quarter - 1)) if quarter > 1 else 1.0
        angle = (row if pair < quarter else column) * speed
        number = complex(features[2 * pair], features[2 * pair + 1]) * complex(math.cos(angle), math.sin(angle))
        result[2 * pair], result[2 * pair + 1] = number.real, number.imag
    return result


def written_out(layer: NormAwareLinearAttention, x: Tensor) -> Tensor:
    width, d, (rows, columns) = layer.width, layer.width // layer.heads, layer.grid
    outputs = []
    for tokens in x:
        length = len(tokens)
        others = length - rows * columns
        q, k, v, g = (tokens @ layer.qkv.weight.T + layer.qkv.bias).split(width, -1)
        mixed = torch.zeros_like(tokens)
        for head in range(layer.heads):
            own = slice(head * d, (head + 1) * d)

            def at(features: Tensor, token: int, others: int = others) -> Tensor:
                return features if token < others else turned(features, *divmod(token - others, columns))

            keys = [((k[n, own] ** 3).clamp_min(0), (-(k[n, own] ** 3)).clamp_min(0)) for n in range(length)]
            for token in range(length):
                size = q[token, own].square().sum().sqrt()
                power = layer.sharpness * (0.5 + math.tanh(size))
                query = [(sign * q[token, own] / (size + 1e-6)).clamp_min(0) ** power for sign in (1, -1)]
                top, bottom = torch.zeros(d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
                for n, key in enumerate(keys):
                    for a, b in zip(query, key, strict=True):
                        top += (at(a, token) @ at(b, n)) * v[n, own] / length
                        bottom += (a @ b) / length
                mixed[token, own] = top / (bottom + 1e-6)
        for token in range(others, length):
            row, column = divmod(token - others, columns)
            mixed[token] += layer.lepe.bias
            for down, right in ((a, b) for a in range(-2, 3) for b in range(-2, 3)):
                if 0 <= row + down < rows and 0 <= column + right < columns:
                    near = v[others + (row + down) * columns + column + right]
                    mixed[token] += layer.lepe.weight[:, 0, 2 + down, 2 + right] * near
        mean, var = mixed.mean(-1, keepdim=True), mixed.var(-1, unbiased=False, keepdim=True)
        normalized = (mixed - mean) / (var + 1e-5).sqrt() * layer.ln.weight + layer.ln.bias
        outputs.append((normalized * g / (1 + (-g).exp())) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(outputs)


@torch.no_grad()
@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 3), columns=st.integers(1, 3), others=st.integers(0, 2), heads=st.integers(1, 2),
    quarters=st.integers(1, 2), sharpness=st.sampled_from([3.0, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_output_is_the_formulas(
    rows: int, columns: int, others: int, heads: int, quarters: int, sharpness: float, seed: int
) -> None:
    layer = attention(4 * quarters * heads, heads, (rows, columns), sharpness=sharpness)
    x = gaussian(2, others + rows * columns, layer.width, seed=seed)
    torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-9, atol=1e-10)
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_gradients_are_those_of_the_forward_pass() -> None:
    layer = attention()
    parameters = dict(layer.named_parameters())

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), x)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(forward, (gaussian(1, 6, 8).requires_grad_(), *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("sharpness", [3.0, 0.5])
def test_a_query_of_zeros_has_a_finite_output_and_gradient(sharpness: float) -> None:
    layer = attention(sharpness=sharpness)
    layer.qkv.bias.data.zero_()
    x = torch.zeros(1, 6, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)


def test_samples_are_apart() -> None:
    layer, x = attention(), gaussian(3, 6, 8)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("how", ["autocast", "converted"])
def test_features_are_computed_in_float32_in_half_precision(how: str) -> None:
    layer, x = attention().float(), gaussian(2, 6, 8).float()
    right = layer(x)
    if how == "converted":
        found = attention().bfloat16()(x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    assert found.dtype == torch.bfloat16
    assert (found - right).abs().max() / right.abs().max() < 0.05


@pytest.mark.parametrize(
    ("width", "heads", "words"),
    [
        (8, 4, r"multiple of 4 of them; there are 8 features and 4 heads\. Set model.heads to one of 1, 2\."),
        (8, 3, r"model.heads to one of 1, 2\."),
        (6, 1, r"6 features and 1 heads\. Set model.width to a multiple of 4\."),
    ],
)
def test_heads_that_cannot_be_turned_are_refused(width: int, heads: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_norm("nalaformer").attention(width, heads, (2, 2))


def test_too_few_tokens_and_a_bad_option_are_refused() -> None:
    with pytest.raises(DataError, match=r"for a map of 2×3 patches, and tokens before them; got 5 tokens"):
        attention()(gaussian(1, 5, 8))
    with pytest.raises(ConfigError, match=r"nalaformer.sharpness must be greater than 0; got 0"):
        make_norm("nalaformer", {"sharpness": 0})


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_the_transformer_takes_it_with_and_without_a_class_token(pool: str) -> None:
    options = {"depth": 1, "pool": pool, "heads": 2}
    model = make_model("vit", make_norm("nalaformer"), num_classes=3, image_size=8, width=8, options=options)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_stream_trains_it() -> None:
    result = fednorm.continual(
        model="vit", norm="nalaformer", learner="naive",
        config={
            "model": {"width": 8, "depth": 1}, "data": {"image_size": 8}, "train": {"batch_size": 6, "epochs": 1},
            "scenario": {"num_experiences": 2, "train_per_experience": 12, "test_per_experience": 6},
        },
    )  # fmt: skip
    assert [len(row) for row in result["accuracy_matrix"]] == [2, 2]
