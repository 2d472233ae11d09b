"""FedBN's six-layer network for digits: three convolutions, three linear layers, a norm after each but the last."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fednorm.cards import Citation
from fednorm.chain import Chain
from fednorm.models import ModelSpec
from fednorm.spec import Norm

_POOLED = (1, 2)
"""Only the first two convolutions are followed by a pooling, which divides the image's side by 4."""


class DigitsCNN(Chain):
    """Images (N, 3, S, S) to logits (N, K).

    Three times convolution (5×5, padding 2), norm, ReLU, to 64, 64 and 128 channels; the first two end in 2×2
    max-pooling. Flattened to 128·(S/4)² features, 6272 for S = 28; then twice linear, norm over (N, C), ReLU, to 2048
    and 512 features; then the classifier. Convolutions have a bias although a norm follows, as in FedBN. Weights are
    drawn as PyTorch's layers draw them, which is what FedBN does.

    With batch normalization, S = 28 and K = 10 it has 14,219,210 parameters. A width other than 64 scales every hidden
    layer; only width 64 is FedBN's network.

    Args:
        norm: The normalization method.
        num_classes: K.
        image_size: S, a multiple of 4.
        width: Channels of the first convolution.
    """

    name = "digits_cnn"

    def __init__(self, norm: Norm, num_classes: int = 10, image_size: int = 28, width: int = 64) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (channels_in, channels_out) in enumerate(((3, width), (width, width), (width, 2 * width)), start=1):
            layers[f"conv{i}"] = norm.conv(channels_in, channels_out, 5, padding=2, bias=True)
            layers[f"norm{i}"] = norm.layer(channels_out, 2)
            layers[f"act{i}"] = norm.activation("relu")
            if i in _POOLED:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        features = 2 * width * (image_size // 4) ** 2
        for i, features_out in enumerate((32 * width, 8 * width), start=1):
            layers[f"fc{i}"] = nn.Linear(features, features_out)
            layers[f"norm{i + 3}"] = norm.layer(features_out, 0)
            layers[f"act{i + 3}"] = norm.activation("relu")
            features = features_out
        layers["fc3"] = nn.Linear(features, num_classes)
        super().__init__(layers, image_size)


def _make(norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
    return DigitsCNN(norm, num_classes, image_size, width)


SPEC = ModelSpec(
    name="digits_cnn",
    summary="conv 5×5 to 64, 64, 128 (pooled twice), linear to 2048, 512, K; a norm and ReLU after each but the last.",
    citation=Citation(
        title="FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
        authors="Li, Jiang, Zhang, Kamp, Dou",
        year=2021,
        arxiv="2102.07623",
        where="ICLR 2021",
    ),
    make=_make,
    input_size=28,
    min_size=4,
    size_step=4,
    width=64,
    width_step=4,
    deviations=("a width other than 64 scales every hidden layer; FedBN has no such option",),
)
