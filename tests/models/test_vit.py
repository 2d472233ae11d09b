"""The vision transformer: against timm's with the same weights, and against its formula written out, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fednorm
from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm, spec_of
from fednorm.spec import Norm

TINY: dict[str, Any] = {"num_classes": 5, "image_size": 8, "width": 8}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vit(norm: str | Norm = "layer_norm", size: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    made = make_norm(norm) if isinstance(norm, str) else norm
    return make_model("vit", made, **{**TINY, **(size or {})}, options={"depth": 2, "heads": 2, **options})


def shaken(model: nn.Module) -> nn.Module:
    """Give every tensor random values, also those that start as zeros and ones."""
    for index, parameter in enumerate(model.parameters()):
        parameter.data += 0.3 * gaussian(*parameter.shape, seed=index).to(parameter.dtype)
    return model


@pytest.mark.parametrize(("image_size", "patch_size", "pool"), [(8, 4, "mean"), (12, 4, "token"), (14, 7, "mean")])
def test_it_is_timms_with_the_same_weights(image_size: int, patch_size: int, pool: str) -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = shaken(vit(size={"image_size": image_size}, patch_size=patch_size, pool=pool, mlp_ratio=3.0).double())
    theirs = timm.VisionTransformer(
        img_size=image_size, patch_size=patch_size, embed_dim=8, depth=2, num_heads=2, mlp_ratio=3.0, num_classes=5,
        global_pool="avg" if pool == "mean" else "token", class_token=pool == "token",
        norm_layer=lambda width, **_: nn.LayerNorm(width, eps=1e-5),
    ).double()  # fmt: skip
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = gaussian(3, 3, image_size, image_size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    own = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad, rtol=1e-8, atol=1e-12, msg=key)


def written_out(w: dict[str, Tensor], x: Tensor, heads: int, patch: int) -> Tensor:
    """Return the logits of a network with RMS normalization: images, tokens, heads, queries one by one."""

    def rms(h: Tensor, name: str) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    logits = []
    for image in x:
        side = image.shape[-1] // patch
        kernel = w["patch_embed.proj.weight"].flatten(1)
        cut = [
            image[:, patch * i : patch * (i + 1), patch * j : patch * (j + 1)] for i in range(side) for j in range(side)
        ]
        h = torch.stack([kernel @ part.flatten() for part in cut]) + w["patch_embed.proj.bias"] + w["pos_embed"][0]
        width = h.shape[-1]
        for block in (0, 1):
            name = f"blocks.{block}"
            q, k, v = linear(rms(h, f"{name}.norm1"), f"{name}.attn.qkv").split(width, -1)
            outputs = []
            for head in range(heads):
                own = slice(head * width // heads, (head + 1) * width // heads)
                scores = q[:, own] @ k[:, own].T / math.sqrt(width / heads)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                outputs.append(weights @ v[:, own])
            h = h + linear(torch.cat(outputs, -1), f"{name}.attn.proj")
            inner = linear(rms(h, f"{name}.norm2"), f"{name}.mlp.fc1")
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            h = h + linear(inner, f"{name}.mlp.fc2")
        logits.append(linear(rms(h.mean(0), "fc_norm"), "head"))
    return torch.stack(logits)


def test_it_computes_its_formula_with_another_norm() -> None:
    model = shaken(vit("rms_norm").double())
    x = gaussian(3, 3, 8, 8)
    torch.testing.assert_close(model(x), written_out(model.state_dict(), x, 2, 4), rtol=1e-10, atol=1e-12)


def test_batch_normalization_has_all_tokens_of_the_batch_as_its_batch() -> None:
    model = vit("batch_norm").double()
    seen: list[Tensor] = []
    layer = model.get_submodule("blocks.0.norm1")
    assert (spec := spec_of(layer)) is not None
    assert spec.name == "batch_norm"
    layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
    x = gaussian(6, 3, 8, 8)
    model(x)
    tokens = model.get_submodule("patch_embed")(x) + model.get_parameter("pos_embed")
    flat = tokens.flatten(0, 1)  # 6 images of 4 patches: 24 samples
    expected = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(seen[0].transpose(1, 2).flatten(0, 1), expected)
    torch.testing.assert_close(layer.get_buffer("running_var"), 0.9 + 0.1 * flat.var(0))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "nap"])
def test_methods_that_leave_it_open_normalize_each_token_by_itself(name: str) -> None:
    layer = make_norm(name).token_layer(6).double()
    x = gaussian(2, 6, 3)
    y = layer(x)
    assert make_norm(name, {"over": "channels"}).token_layer(6).double()(x).equal(y)
    other = x.clone()
    other[:, :, 0] += 7 * gaussian(2, 6, seed=3)
    assert torch.equal(layer(other)[:, :, 1:], y[:, :, 1:])


def test_the_published_tiny_width_has_heads_of_64_and_so_do_others() -> None:
    def heads(width: int) -> int:
        model = make_model("vit", Norm(), num_classes=2, image_size=4, width=width, options={"depth": 1})
        return model.get_submodule("blocks.0.attn").heads  # type: ignore[return-value]

    assert [heads(width) for width in (192, 384, 128, 200, 8, 1)] == [3, 6, 2, 2, 1, 1]


def test_parameters_are_counted() -> None:
    block = 4 * 192 + (192 + 1) * 3 * 192 + (192 + 1) * 192 + (192 + 1) * 768 + (768 + 1) * 192
    model = make_model("vit", make_norm("layer_norm"), num_classes=10)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == (48 + 1) * 192 + 64 * 192 + 6 * block + 2 * 192 + (192 + 1) * 10 == 2_693_194


def test_initial_weights_are_truncated_normals() -> None:
    model = make_model("vit", make_norm("layer_norm"), num_classes=10, options={"depth": 1})
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    assert len(linears) == 4
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert not linear.bias.any()
    assert model.get_parameter("pos_embed").std().item() == pytest.approx(0.02, rel=0.03)


def test_a_normalizer_free_norm_scales_its_branches() -> None:
    model = vit("sws").double()
    gains = {key: p for key, p in model.named_parameters() if key.endswith("skip_gain")}
    assert list(gains) == [f"blocks.{b}.residual{r}.skip_gain" for b in (0, 1) for r in (1, 2)]
    betas = [beta for block in model.get_submodule("blocks") for beta in block.betas]  # type: ignore[union-attr]
    assert betas == pytest.approx([(1 + k * 0.2**2) ** -0.5 for k in range(4)])
    block, h = model.get_submodule("blocks.1"), gaussian(2, 4, 8)
    for gain in gains.values():
        gain.data.fill_(0.7)
    inner = h + 0.2 * 0.7 * block.attn(h * betas[2])  # type: ignore[operator]
    torch.testing.assert_close(block(h), inner + 0.2 * 0.7 * block.mlp(inner * betas[3]))  # type: ignore[operator]


@settings(max_examples=8, deadline=None)
@given(
    side=st.integers(1, 4), patch=st.integers(1, 4), depth=st.integers(1, 2), heads=st.integers(1, 3),
    head=st.integers(1, 4), pool=st.sampled_from(["mean", "token"]),
)  # fmt: skip
def test_every_size_that_the_patch_divides_is_taken(
    side: int, patch: int, depth: int, heads: int, head: int, pool: str
) -> None:
    model = make_model(
        "vit", make_norm("rms_norm"), num_classes=3, image_size=side * patch, width=heads * head,
        options={"patch_size": patch, "depth": depth, "heads": heads, "pool": pool},
    )  # fmt: skip
    assert model(torch.randn(2, 3, side * patch, side * patch)).shape == (2, 3)
    assert model.get_parameter("pos_embed").shape == (1, side**2 + (pool == "token"), heads * head)


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ({"image_size": 30}, {}, r"patches of 4×4 pixels, and 30 is no multiple.*one of 1, 2, 3, 5, 6, 10, 15, 30"),
        ({}, {"heads": 3}, r"8 features and 3 heads.*one of 1, 2, 4, 8, or 0"),
        ({}, {"heads": -1}, r"model.heads must be an integer of 0 or more; got -1"),
        ({}, {"depth": 0}, r"model.depth must be an integer of 1 or more; got 0"),
        ({}, {"patch_size": 0}, r"model.patch_size must be an integer of 1 or more; got 0"),
        ({}, {"mlp_ratio": 0.0}, r"model.mlp_ratio must be greater than 0"),
        ({}, {"mlp_ratio": 0.01}, r"no feature inside its MLP"),
        ({}, {"pool": "max"}, r"model.pool must be one of mean, token; got 'max'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(size: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vit(size=size, **options)


def test_other_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"vit takes images of shape \(N, 3, 8, 8\); got \(2, 3, 8, 12\)"):
        vit()(torch.zeros(2, 3, 8, 12))


# Both worlds ----------------------------------------------------------------------------------------------------------

TRAIN = {"batch_size": 6, "learning_rate": 0.05}
MODEL = {"width": 8, "depth": 1}


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn"])
def test_a_federation_trains_it(strategy: str) -> None:
    data = {"image_size": 8, "train_per_client": 12, "test_per_domain": 6}
    config = {"model": MODEL, "train": TRAIN, "data": data}
    result = fednorm.federated(model="vit", strategy=strategy, norm="layer_norm", rounds=1, config=config)
    # norm1, norm2 and fc_norm have a scale and a shift each.
    assert result["plan"]["local"] == (6 if strategy == "fedbn" else 0)
    assert 0 <= result["final"]["mean"] <= 1


def test_a_stream_trains_it_with_a_norm_that_needs_tasks() -> None:
    scenario = {"num_experiences": 2, "train_per_experience": 12, "test_per_experience": 6}
    result = fednorm.continual(
        model="vit", norm="adab2n", learner="er",
        config={"model": MODEL, "data": {"image_size": 8}, "scenario": scenario, "train": {**TRAIN, "epochs": 1}},
    )  # fmt: skip
    assert [len(row) for row in result["accuracy_matrix"]] == [2, 2]
