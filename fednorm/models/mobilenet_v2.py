"""MobileNetV2 for small images: inverted residual blocks with depthwise convolutions."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.models import ModelSpec
from fednorm.models._residual import ExpectedStd, residual_of
from fednorm.spec import Norm

_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride of each stage; the second's stride is 2 in the paper."""

_WIDTH = 32
_LAST = 1280


def _multiple_of_8(channels: float) -> int:
    """Round to the nearest multiple of 8, at least 8, and never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _blocks(width: int) -> list[tuple[int, int, int, int]]:
    """Return channels in, channels, stride and expansion of every block."""
    blocks: list[tuple[int, int, int, int]] = []
    channels_in = width
    for expansion, plan, count, first_stride in _STAGES:
        channels = _multiple_of_8(plan * width / _WIDTH)
        for index in range(count):
            blocks.append((channels_in, channels, first_stride if index == 0 else 1, expansion))
            channels_in = channels
    return blocks


def _joins(channels_in: int, channels: int, stride: int) -> bool:
    """Return whether a block keeps the shape, and so has a residual sum."""
    return stride == 1 and channels_in == channels


def _unit(norm: Norm, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return convolution, norm and ReLU6."""
    padding = kernel // 2
    return nn.Sequential(
        norm.conv(channels_in, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False),
        norm.layer(channels, 2),
        norm.activation("relu6"),
    )


class InvertedResidual(nn.Module):
    """The inverted residual block with a linear bottleneck.

        h + f(h)        where the shape stays,        f(h)        elsewhere

    with f: 1×1 convolution to ``expansion · channels_in`` channels (none where expansion is 1), 3×3 depthwise
    convolution, each with norm and ReLU6; 1×1 convolution to ``channels``, norm, no activation.

    Where ``norm.residual_alpha`` is a number alpha: ``h + alpha · skip_gain · f(beta · h)`` and ``f(beta · h)``, with
    beta as in :mod:`fednorm.models._residual`. There is no activation before f, since the bottleneck stays linear.

    Args:
        norm: The normalization method.
        channels_in: Channels of h.
        channels: Channels of the result.
        stride: Of the depthwise convolution.
        expansion: t.
        branches: Residual branches of the whole network.
        expected: The trunk's expected standard deviation so far; taken past this block.
    """

    def __init__(
        self,
        norm: Norm,
        channels_in: int,
        channels: int,
        stride: int,
        expansion: int,
        branches: int,
        expected: ExpectedStd,
    ) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_unit(norm, channels_in, hidden, 1)]
        layers += [
            _unit(norm, hidden, hidden, 3, stride, groups=hidden),
            norm.conv(hidden, channels, 1, bias=False),
            norm.layer(channels, 2),
        ]
        self.conv = nn.Sequential(*layers)
        joins = _joins(channels_in, channels, stride)
        self.residual = residual_of(norm, branches) if joins else None
        self.beta = expected.enter("identity" if joins else "none")

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        branch = self.conv(hidden if self.beta == 1.0 else hidden * self.beta)
        return cast(Tensor, branch if self.residual is None else self.residual(hidden, branch))

    def extra_repr(self) -> str:
        """Return beta for the module's printed form."""
        return f"beta={self.beta:.4g}"


class MobileNetV2(nn.Sequential):
    """Images (N, 3, S, S) to logits (N, K), for any S; meant for 32×32, where the last stage sees 4×4.

    Strides: 1 in the first convolution and in the 24-channel stage, where the paper, for 224×224, has 2; 2 in the 32-,
    64- and 160-channel stages, as in the paper. Everything else is torchvision's network, whose parameters also have
    the same names below ``features``; but for its dropout of 0.2 before the classifier, which is left out so that one
    forward pass is a function of the images. With batch normalization, width 32 and K = 10 it has 2,236,682
    parameters. Weights are drawn as the norm's convolutions draw them.

    Args:
        norm: The normalization method.
        num_classes: K.
        width: Channels of the first convolution, a multiple of 8. Every stage is scaled by width / 32 and rounded to a
            multiple of 8; the last 1280 channels are scaled up, never down.
    """

    def __init__(self, norm: Norm, num_classes: int = 10, width: int = _WIDTH) -> None:
        scale = width / _WIDTH
        expected = ExpectedStd(norm.residual_alpha)
        features: list[nn.Module] = [_unit(norm, 3, width, 3)]
        blocks = _blocks(width)
        branches = sum(_joins(channels_in, channels, stride) for channels_in, channels, stride, _ in blocks)
        features += [InvertedResidual(norm, *block, branches, expected) for block in blocks]
        channels_in = blocks[-1][1]
        last = _multiple_of_8(_LAST * max(1.0, scale))
        features.append(_unit(norm, channels_in, last, 1))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["features"] = nn.Sequential(*features)
        layers["average"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = nn.Linear(last, num_classes)
        super().__init__(layers)


def _make(norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
    del image_size
    return MobileNetV2(norm, num_classes, width)


SPEC = ModelSpec(
    name="mobilenet_v2",
    summary="3×3 stem, 17 inverted residual blocks with depthwise convolutions, 1×1 to 1280, average, linear.",
    citation=Citation(
        title="MobileNetV2: Inverted Residuals and Linear Bottlenecks",
        authors="Sandler, Howard, Zhu, Zhmoginov, Chen",
        year=2018,
        arxiv="1801.04381",
        where="CVPR 2018",
    ),
    make=_make,
    input_size=32,
    width=_WIDTH,
    width_step=8,
    deviations=(
        "Stride 1 instead of 2 in the first convolution and in the 24-channel stage, for 32×32 images.",
        "No dropout before the classifier (torchvision: 0.2).",
        "A norm with residual_alpha scales the residual branches after arXiv 2101.08692, which did not treat "
        "this network.",
    ),
)
