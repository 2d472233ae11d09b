"""``convert`` over torchvision's and timm's classifiers: every result runs in both modes and gives the same shapes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from fednorm.conversion.replacement import convert_with_report
from fednorm.errors import ConfigError
from fednorm.norms import recognition_of

METHODS = ("batch_norm", "layer_norm", "none", "sws")

TORCHVISION = {
    **dict.fromkeys(
        ("resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5",
         "mnasnet0_5", "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t", "googlenet", "vgg11_bn"), 64
    ),
    **dict.fromkeys(("vit_b_32", "maxvit_t"), 224),
}  # fmt: skip

TIMM = (
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_resnet", "test_convnext", "test_convnext2",
    "test_convnext3", "test_efficientnet", "test_efficientnet_gn", "test_efficientnet_ln", "test_byobnet",
    "test_mambaout", "resnet10t", "resnetv2_18", "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224",
    "caformer_s18", "poolformer_s12", "efficientvit_b0", "mobilenetv4_conv_small", "levit_128s", "edgenext_xx_small",
    "coat_lite_tiny", "xcit_nano_12_p16_224", "mobilevit_xxs", "ghostnet_050", "hgnetv2_b0", "lcnet_035", "dla34",
    "eva02_tiny_patch14_224", "efficientvit_m0", "tiny_vit_5m_224", "mixer_s32_224", "gmixer_12_224",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def check(model: nn.Module, size: int) -> None:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        expected = model(x)
    norms = [path for path, module in model.named_modules() if recognition_of(module) is not None]
    own = {type(model.get_submodule(path)).__name__ for path in norms}
    assert norms
    for name in METHODS:
        converted, report = convert_with_report(model, name)
        assert report.layers == norms
        with torch.no_grad():
            y = converted(x)
            assert y.shape == expected.shape
            converted.train()(x)
        if name == "batch_norm" and all("Batch" in kind for kind in own):
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_classifiers_convert(name: str) -> None:
    check(getattr(torchvision.models, name)(num_classes=5), TORCHVISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_timms_classifiers_convert(name: str) -> None:
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, num_classes=5)
    size = model.default_cfg["input_size"][1]
    check(model, size if model.default_cfg.get("fixed_input_size") else min(size, 96))


def test_networks_of_unknown_layers_are_refused_with_their_names() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_efficientnet_evos", num_classes=5)
    with pytest.raises(ConfigError, match=r"formula is unknown: bn1 \(EvoNorm2dS0\)"):
        convert_with_report(model, "group_norm")
