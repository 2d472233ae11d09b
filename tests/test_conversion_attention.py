"""Converting a transformer to a norm that brings its attention: what is kept, and what is refused with its path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fednorm.blocks import Attention
from fednorm.conversion import convert, convert_with_report
from fednorm.errors import ConfigError, DataError
from fednorm.models import make_model
from fednorm.norms import make_norm
from fednorm.norms.affine_scaled_attention import AffineScaledAttention

NORM = "affine_scaled_attention"


def images(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ours() -> nn.Module:
    return make_model("vit", make_norm("layer_norm"), num_classes=3, image_size=16, width=8, options={"depth": 2})


def torchvisions() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3)


def timms() -> nn.Module:
    transformers = pytest.importorskip("timm.models.vision_transformer")
    return transformers.VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)  # type: ignore[no-any-return]


def encoder(*, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "ours": (ours, images(), ["blocks.0.attn", "blocks.1.attn"]),
    "torchvision": (torchvisions, images(), [f"encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)]),
    "timm": (timms, images(), ["blocks.0.attn", "blocks.1.attn"]),
    "torch": (lambda: encoder(batch_first=True), tokens(2, 5, 8), ["layers.0.self_attn", "layers.1.self_attn"]),
    "torch, length first": (
        lambda: encoder(batch_first=False),
        tokens(5, 2, 8),
        ["layers.0.self_attn", "layers.1.self_attn"],
    ),
}


def as_softmax(model: nn.Module) -> nn.Module:
    """Give every affine-scaled attention the numbers with which it is softmax attention: alpha and alpha_ma of 1."""
    for module in model.modules():
        if isinstance(module, AffineScaledAttention):
            module.alpha_ma.fill_(1.0)
            module.alpha = lambda x, heads=module.heads: x.new_ones(len(x), heads, x.shape[1], 1)  # type: ignore[method-assign, misc]
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_kept_and_the_rest_of_the_network_too(name: str) -> None:
    make, x, paths = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    converted, report = convert_with_report(model, NORM)
    assert report.attentions == paths
    assert not converted.training
    kept = {tuple(p.shape): p for p in model.parameters() if p.ndim == 2}
    assert {tuple(p.shape) for p in converted.parameters() if p.ndim == 2} == {*kept, (model_heads(converted), 8)}
    torch.testing.assert_close(as_softmax(converted)(x), model(x), rtol=1e-4, atol=1e-5)


def model_heads(model: nn.Module) -> int:
    return next(module.heads for module in model.modules() if isinstance(module, Attention))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_comes_out_trains(name: str) -> None:
    make, x, _ = NETWORKS[name]
    torch.manual_seed(0)
    converted = convert(make().train(), NORM, phi="sigmoid")
    converted(x).square().sum().backward()
    assert [key for key, p in converted.named_parameters() if p.grad is None] == []
    assert all(m.alpha_ma.min() > 0 for m in converted.modules() if isinstance(m, AffineScaledAttention))


def test_layers_go_to_the_norm_beside() -> None:
    converted = convert(torchvisions(), NORM, beside="none")
    assert not [m for m in converted.modules() if isinstance(m, nn.LayerNorm)]


def test_frozen_weights_stay_frozen_and_types_are_kept() -> None:
    model = ours().double().requires_grad_(False)
    converted = convert(model, NORM)
    assert not [p for p in converted.parameters() if p.requires_grad]
    assert {t.dtype for t in converted.state_dict().values()} == {torch.float64}


def test_the_way_back_keeps_the_weights_and_options_can_change() -> None:
    model = make_model("vit", make_norm(NORM), num_classes=3, image_size=16, width=8, options={"depth": 1})
    back, report = convert_with_report(model, "layer_norm")
    assert report.attentions == ["blocks.0.attn"]
    assert type(back.get_submodule("blocks.0.attn")) is Attention
    assert torch.equal(back.get_parameter("blocks.0.attn.qkv.weight"), model.get_parameter("blocks.0.attn.qkv.weight"))
    model(images())
    same, report = convert_with_report(model, NORM)
    assert report.attentions == []
    other = convert(model, NORM, phi="sigmoid").get_submodule("blocks.0.attn")
    assert isinstance(other, AffineScaledAttention)
    assert other.phi == "sigmoid"
    assert torch.equal(other.alpha_ma, same.get_buffer("blocks.0.attn.alpha_ma"))
    assert other.alpha_ma.min() > 0


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("model", "norm", "words"),
    [
        (torchvisions, "nalaformer", r"'encoder.layers.encoder_layer_0.self_attention' \(Multi.*rows and columns"),
        (timms, "nalaformer", r"Attention 'blocks.0.attn' \(Attention\).*--model vit --norm nalaformer"),
        (ours, "nalaformer", r"Attention 'blocks.0.attn' \(Attention\) makes 3 parts of a token.*4"),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4)), NORM,
            r"Attention '0' \(MultiheadAttention\) has keys or values of its own",
        ),
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.1)), NORM, r"'0' .*dropout of attention weights"),
        (lambda: torchvision.models.swin_t(num_classes=2), NORM,
         r"Attention 'features.1.0.attn' \(ShiftedWindowAttention\) does not compute plain softmax self-attention"),
        (lambda: torchvision.models.resnet18(num_classes=2), NORM, r"ResNet has none that it could.*--model vit"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_its_path(model: Callable[[], nn.Module], norm: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(model(), norm)


def test_masks_and_other_keys_are_refused_when_they_come() -> None:
    layer = convert(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), NORM)[0]  # type: ignore[index]
    x = tokens(2, 5, 8)
    assert layer(x, x, x, need_weights=False)[1] is None
    with pytest.raises(DataError, match="AffineScaledAttention takes no mask"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(DataError, match="query, key and value are not one tensor"):
        layer(x, x + 1, x)


def test_a_layer_over_each_position_is_replaced_by_one_over_each_position() -> None:
    """Layer normalization of tokens is over the features of each; so is what replaces it, unless one says otherwise."""
    x = tokens(2, 5, 8)
    other = torch.cat([x[:, :1] + 7, x[:, 1:]], 1)
    last, first = nn.LayerNorm(8), make_norm("layer_norm", {"over": "channels"}).layer(8, 1)
    for options, apart in (({}, True), ({"over": "sample"}, False)):
        new = convert(nn.Sequential(last), "rms_norm", **options)
        assert torch.equal(new(x)[:, 1:], new(other)[:, 1:]) == apart
        new = convert(nn.Sequential(first), "rms_norm", **options)
        assert torch.equal(new(x.mT)[:, :, 1:], new(other.mT)[:, :, 1:]) == apart
