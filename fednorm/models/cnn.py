"""The convolutional network of NaP's continual memorization: four convolutions and a hidden linear layer."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fednorm.cards import Citation
from fednorm.chain import Chain
from fednorm.models import ModelSpec
from fednorm.spec import Norm

_DEPTH = 4
_WIDTH = 32
_POOLED = (2, 4)
"""Pairs of convolutions, each with a pooling at its end: so are the networks of the paper's Figures 1 and 2."""


class CNN(Chain):
    """Images (N, 3, S, S) to logits (N, K).

    Four times convolution (3×3, padding 1), norm, ReLU, each to ``width`` channels; the second and the fourth end in
    2×2 max-pooling that keeps an odd row and column (⌈S/2⌉). Flattened to width·⌈S/4⌉² features, 2048 for S = 32; then
    linear, norm over (N, C), ReLU, to 8·width features, 256 for width 32; then the classifier. Every layer has a bias
    although a norm follows: a method for which it is redundant takes it away (:meth:`~fednorm.spec.Norm.prepare`).
    Weights are drawn as PyTorch's layers draw them.

    With width 32, S = 32 and K = 10 it has 555,754 parameters, and 768 more where the norm has a scale and a shift for
    each channel.

    Args:
        norm: The normalization method.
        num_classes: K.
        image_size: S.
        width: Channels of every convolution.
    """

    name = "cnn"

    def __init__(self, norm: Norm, num_classes: int = 10, image_size: int = 32, width: int = _WIDTH) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels_in = 3
        for i in range(1, _DEPTH + 1):
            layers[f"conv{i}"] = norm.conv(channels_in, width, 3, padding=1, bias=True)
            layers[f"norm{i}"] = norm.layer(width, 2)
            layers[f"act{i}"] = norm.activation("relu")
            if i in _POOLED:
                layers[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)
            channels_in = width
        layers["flatten"] = nn.Flatten()
        hidden = 8 * width
        layers["fc1"] = nn.Linear(width * ((image_size + 3) // 4) ** 2, hidden)
        layers[f"norm{_DEPTH + 1}"] = norm.layer(hidden, 0)
        layers[f"act{_DEPTH + 1}"] = norm.activation("relu")
        layers["fc2"] = nn.Linear(hidden, num_classes)
        super().__init__(layers, image_size)


def _make(norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
    return CNN(norm, num_classes, image_size, width)


SPEC = ModelSpec(
    name="cnn",
    summary="conv 3×3 to 32, four times (pooled twice), linear to 256, K; a norm and ReLU after each but the last.",
    citation=Citation(
        title="Normalization and effective learning rates in reinforcement learning",
        authors="Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney",
        year=2024,
        arxiv="2407.01800",
        where="NeurIPS 2024, section 5 (continual memorization)",
    ),
    make=_make,
    input_size=32,
    width=_WIDTH,
    deviations=(
        "The paper states neither kernels, strides nor pooling: ours are 3×3 kernels with padding 1, stride 1, and 2×2 "
        "max-pooling after each pair of convolutions, as in the networks of its Figures 1 and 2.",
        "PyTorch's initial weights; the paper does not state its own.",
        "A width other than 32 scales every hidden layer; the paper has no such option.",
    ),
)
