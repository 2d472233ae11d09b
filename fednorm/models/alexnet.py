"""AlexNet as FedBN trains it on Office-Caltech and DomainNet: a norm after every layer but the last, no dropout."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fednorm.cards import Citation
from fednorm.models import ModelSpec
from fednorm.spec import Norm

_CONVOLUTIONS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
"""Channels, kernel size, stride and padding: torchvision's plan (Krizhevsky's "one weird trick" form)."""

_POOLED = (1, 2, 5)
_CELLS = 6
_HIDDEN = 4096


class AlexNet(nn.Sequential):
    """Images (N, 3, S, S) to logits (N, K), for any S of at least 63.

    Five times convolution, norm, ReLU, to 64, 192, 384, 256 and 256 channels (kernels 11, 5, 3, 3, 3; the first with
    stride 4); after the first, second and fifth a 3×3 max-pooling with stride 2. Averaged to 6×6 cells, flattened to
    9216 features; twice linear, norm over (N, C), ReLU, to 4096; then the classifier. Convolutions have a bias
    although a norm follows, as in FedBN. Below S = 63 the last pooling has no window left; below S = 223 the averaging
    repeats cells.

    Args:
        norm: The normalization method.
        num_classes: K.
    """

    def __init__(self, norm: Norm, num_classes: int = 10) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels_in = 3
        for i, (channels, kernel, stride, padding) in enumerate(_CONVOLUTIONS, start=1):
            layers[f"conv{i}"] = norm.conv(channels_in, channels, kernel, stride=stride, padding=padding, bias=True)
            layers[f"norm{i}"] = norm.layer(channels, 2)
            layers[f"act{i}"] = norm.activation("relu")
            if i in _POOLED:
                layers[f"pool{i}"] = nn.MaxPool2d(3, stride=2)
            channels_in = channels
        layers["average"] = nn.AdaptiveAvgPool2d(_CELLS)
        layers["flatten"] = nn.Flatten()
        features = channels_in * _CELLS**2
        for i in (1, 2):
            layers[f"fc{i}"] = nn.Linear(features, _HIDDEN)
            layers[f"norm{i + 5}"] = norm.layer(_HIDDEN, 0)
            layers[f"act{i + 5}"] = norm.activation("relu")
            features = _HIDDEN
        layers["fc3"] = nn.Linear(features, num_classes)
        super().__init__(layers)


def _make(norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
    del image_size, width
    return AlexNet(norm, num_classes)


SPEC = ModelSpec(
    name="alexnet",
    summary="AlexNet with a norm after each convolution and each hidden linear layer, without dropout.",
    citation=Citation(
        title="One weird trick for parallelizing convolutional neural networks",
        authors="Krizhevsky",
        year=2014,
        arxiv="1404.5997",
        where="with norms and without dropout as in FedBN, arXiv 2102.07623",
    ),
    make=_make,
    input_size=256,
    min_size=63,
)
