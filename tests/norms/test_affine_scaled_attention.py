"""Affine-scaled attention against its formula: weights written out, query by query, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fednorm
from fednorm.blocks import Attention
from fednorm.cards import NORMS
from fednorm.errors import ConfigError, DataError, UnknownNameError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.affine_scaled_attention import AffineScaledAttention
from fednorm.training.step import batch_coupled


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention(width: int = 6, heads: int = 2, **options: Any) -> AffineScaledAttention:
    torch.manual_seed(0)
    made = make_norm("affine_scaled_attention", options).attention(width, heads, (2, 2)).double()
    assert isinstance(made, AffineScaledAttention)
    for index, parameter in enumerate(made.parameters()):
        parameter.data += 0.7 * gaussian(*parameter.shape, seed=index)
    made.scale.weight.data *= 4  # so that some alpha reach the ends of the clipping
    return made


def phi(u: float, kind: str) -> float:
    if kind == "sigmoid":
        return 1 / (1 + math.exp(-u))
    return 0.0 if u <= -5 else 1.0 if u >= 5 else 0.1 * u + 0.5


def written_out(layer: AffineScaledAttention, x: Tensor, alpha_ma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the weights (N, H, L, L) and alpha (N, H, L), one query at a time."""
    n, length, width = x.shape
    d = width // layer.heads
    weights = torch.zeros(n, layer.heads, length, length, dtype=torch.float64)
    alphas = torch.zeros(n, layer.heads, length, dtype=torch.float64)
    mixed = torch.zeros_like(x)
    for sample in range(n):
        q, k, v = (x[sample] @ layer.qkv.weight.T + layer.qkv.bias).split(width, -1)
        for head in range(layer.heads):
            own = slice(head * d, (head + 1) * d)
            for query in range(length):
                scores = [float(q[query, own] @ k[key, own]) / math.sqrt(d) for key in range(length)]
                total = sum(map(math.exp, scores))
                alpha = phi(float(x[sample, query] @ layer.scale.weight[head]), layer.phi)
                alphas[sample, head, query] = alpha
                for key, score in enumerate(scores):
                    beta = (float(alpha_ma[head]) - alpha) / length
                    weights[sample, head, query, key] = alpha * math.exp(score) / total + beta
                mixed[sample, query, own] = weights[sample, head, query] @ v[:, own]
    return mixed @ layer.proj.weight.T + layer.proj.bias, weights, alphas


@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 3), length=st.integers(1, 5), heads=st.integers(1, 3),
    kind=st.sampled_from(["linear_clipping", "sigmoid"]), alpha_ma=st.floats(-1, 2), rho=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_output_and_running_mean_are_the_formulas(
    n: int, length: int, heads: int, kind: str, alpha_ma: float, rho: float, seed: int
) -> None:
    layer = attention(2 * heads, heads, phi=kind, rho=rho, alpha_ma_init=alpha_ma)
    x = 2 * gaussian(n, length, 2 * heads, seed=seed)
    with torch.no_grad():
        before = layer.alpha_ma.clone()
        expected, weights, alphas = written_out(layer, x, before)
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(layer.alpha_ma, before)
        # Whatever alpha is, the weights of a query sum to alpha_ma.
        torch.testing.assert_close(weights.sum(-1), before[None, :, None].expand(n, heads, length))
        after = rho * before + (1 - rho) * alphas.mean((0, 2))
        torch.testing.assert_close(layer.train()(x), written_out(layer, x, after)[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.alpha_ma, after)


def test_both_ends_of_the_clipping_are_reached_and_weights_can_be_negative() -> None:
    layer, x = attention(alpha_ma_init=0.4), 2 * gaussian(4, 5, 6)
    alpha = layer.alpha(x)
    assert {0.0, 1.0} <= set(alpha.flatten().tolist())
    assert ((alpha > 0) & (alpha < 1)).any()
    with torch.no_grad():
        assert written_out(layer, x, layer.alpha_ma)[1].min() < 0


def test_no_gradient_goes_through_the_running_mean() -> None:
    layer = attention(phi="sigmoid").train()
    x = gaussian(2, 4, 6).requires_grad_()
    layer(x).square().sum().backward()
    gradient = layer.scale.weight.grad
    held = attention(phi="sigmoid", rho=1.0).train()
    held.alpha_ma.copy_(layer.alpha_ma)
    held(x.detach()).square().sum().backward()
    torch.testing.assert_close(gradient, held.scale.weight.grad)
    assert torch.autograd.gradcheck(layer.eval(), (gaussian(1, 3, 6).requires_grad_(),))


def test_alpha_and_alpha_ma_of_one_are_softmax_attention() -> None:
    layer = attention(alpha_ma_init=1.0).eval()
    layer.scale.weight.data.zero_()
    layer.scale.weight.data[:, 0] = 100.0
    x = gaussian(2, 4, 6)
    x[:, :, 0] = 1.0  # u = 100: alpha is 1
    plain = Attention(6, 2, (2, 2)).double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith(("qkv", "proj"))})
    torch.testing.assert_close(layer(x), plain(x))


def test_in_half_precision_the_mean_is_taken_in_float32() -> None:
    layer, x = attention(), gaussian(8, 50, 6)
    right = layer.train()(x)
    half = attention().train().to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).double(), right, rtol=0.1, atol=0.1)
    # 400 values a head near 0.5: a sum in bfloat16 would stand still at 128.
    torch.testing.assert_close(half.alpha_ma.double(), layer.alpha_ma, rtol=0.02, atol=0)


def test_the_card_tells_what_it_is() -> None:
    card = NORMS["affine_scaled_attention"]
    assert card.reconstruction
    assert not card.normalizes
    assert card.batch_coupled
    assert card.train_eval_differ
    assert card.tried_on == "vit"


def test_a_batch_of_one_can_be_trained_on_although_the_batch_counts() -> None:
    from fednorm.norms import spec_of

    layer, x = attention(), gaussian(3, 4, 6)
    other = x.clone()
    other[0] += 1
    assert not torch.allclose(layer.train()(x)[1:], attention().train()(other)[1:])
    assert not batch_coupled(nn.Sequential(layer), spec_of)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phi": "relu"}, "phi must be one of linear_clipping, sigmoid; got 'relu'"),
        ({"rho": 1.5}, "affine_scaled_attention.rho is a share, 0 to 1; got 1.5"),
        ({"rho": -0.1}, "affine_scaled_attention.rho is a share, 0 to 1; got -0.1"),
        ({"alpha_ma_init": math.inf}, "alpha_ma_init must be a finite number"),
        ({"beside": 3}, "norm.beside names the norm beside this one.*got 3"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_norm("affine_scaled_attention", options)


def test_an_unknown_norm_beside_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'rms_norm'"):
        make_norm("affine_scaled_attention", {"beside": "rmsnorm"})


@pytest.mark.parametrize("name", ["affine_scaled_attention", "nalaformer"])
@pytest.mark.parametrize("model", ["digits_cnn", "resnet18", "mlp"])
def test_a_network_without_tokens_is_refused_with_the_remedy(name: str, model: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} replaces the attention of a transformer.*--model vit"):
        make_model(model, make_norm(name), num_classes=3, image_size=8, width=8)


def test_other_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"tokens of shape \(N, L, 6\); got \(2, 3, 5\)"):
        attention()(gaussian(2, 3, 5))


@pytest.mark.parametrize("name", ["affine_scaled_attention", "nalaformer"])
def test_the_layers_beside_are_those_of_another_norm(name: str) -> None:
    def kinds(beside: str) -> set[str]:
        model = make_model(
            "vit", make_norm(name, {"beside": beside}), num_classes=3, image_size=8, width=8, options={"depth": 1}
        )
        return {type(m).__name__ for n, m in model.named_modules() if "norm" in n.split(".")[-1]}

    assert kinds("layer_norm") == {"ChannelLayerNorm", "SampleLayerNorm"}
    assert kinds("batch_norm") == {"BatchNorm1d"}
    assert kinds("none") == {"Identity"}


# Three layers' scale and shift, and alpha_ma: everything that is no weight, and the statistic alone.
@pytest.mark.parametrize(("strategy", "local"), [("fedavg", 0), ("fedbn", 7), ("silobn", 1)])
def test_a_federation_trains_it_and_its_running_mean_is_a_statistic(strategy: str, local: int) -> None:
    config = {
        "model": {"width": 8, "depth": 1}, "train": {"batch_size": 6},
        "data": {"image_size": 8, "train_per_client": 12, "test_per_domain": 6},
    }  # fmt: skip
    result = fednorm.federated(model="vit", strategy=strategy, norm="affine_scaled_attention", rounds=1, config=config)
    assert result["plan"]["local"] == local
