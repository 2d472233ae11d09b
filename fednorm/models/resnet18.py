"""ResNet-18 for small images, with a normalizer-free form for norms that ask for it."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from fednorm.cards import Citation
from fednorm.models import ModelSpec
from fednorm.models._residual import ExpectedStd, residual_of
from fednorm.spec import Norm

_STAGES = 4
_BLOCKS = 2


def _shortcut(norm: Norm, channels_in: int, channels: int, stride: int) -> nn.Sequential | None:
    """Return the 1×1 convolution and norm where the shape changes, or None for the identity."""
    if stride == 1 and channels_in == channels:
        return None
    return nn.Sequential(norm.conv(channels_in, channels, 1, stride=stride, bias=False), norm.layer(channels, 2))


class BasicBlock(nn.Module):
    """The basic block of He et al. (arXiv 1512.03385), activated after the sum.

        act(s(h) + norm(conv(act(norm(conv(h))))))

    where s is the identity, or ``downsample`` (1×1 convolution and norm) where the shape changes.

    Args:
        norm: The normalization method.
        channels_in: Channels of h.
        channels: Channels of the result.
        stride: Of the first convolution and of ``downsample``.
    """

    def __init__(self, norm: Norm, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = norm.conv(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm.layer(channels, 2)
        self.act1 = norm.activation("relu")
        self.conv2 = norm.conv(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm.layer(channels, 2)
        self.downsample = _shortcut(norm, channels_in, channels, stride)
        self.residual = residual_of(norm, _STAGES * _BLOCKS)
        self.act2 = norm.activation("relu")

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(hidden)))))
        shortcut = hidden if self.downsample is None else self.downsample(hidden)
        return cast(Tensor, self.act2(self.residual(shortcut, branch)))


class NFBasicBlock(nn.Module):
    """The normalizer-free basic block (arXiv 2101.08692), activated before the convolutions.

        a = act(beta · h),      s(h) + alpha · skip_gain · norm(conv(act(norm(conv(a)))))

    where s is the identity, or ``downsample`` of a, not of h, where the shape changes. The norms are what
    ``Norm.layer`` gives: identities for a weight reparameterization.

    Args:
        norm: The normalization method; its ``residual_alpha`` is a number.
        channels_in: Channels of h.
        channels: Channels of the result.
        stride: Of the first convolution and of ``downsample``.
        expected: The trunk's expected standard deviation so far; taken past this block.
    """

    def __init__(self, norm: Norm, channels_in: int, channels: int, stride: int, expected: ExpectedStd) -> None:
        super().__init__()
        self.act1 = norm.activation("relu")
        self.conv1 = norm.conv(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm.layer(channels, 2)
        self.act2 = norm.activation("relu")
        self.conv2 = norm.conv(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm.layer(channels, 2)
        self.downsample = _shortcut(norm, channels_in, channels, stride)
        self.residual = residual_of(norm, _STAGES * _BLOCKS)
        self.beta = expected.enter("identity" if self.downsample is None else "convolution")

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels, ⌈H/stride⌉, ⌈W/stride⌉)."""
        active = self.act1(hidden if self.beta == 1.0 else hidden * self.beta)
        branch = self.norm2(self.conv2(self.act2(self.norm1(self.conv1(active)))))
        shortcut = hidden if self.downsample is None else self.downsample(active)
        return cast(Tensor, self.residual(shortcut, branch))

    def extra_repr(self) -> str:
        """Return beta for the module's printed form."""
        return f"beta={self.beta:.4g}"


class ResNet18(nn.Sequential):
    """Images (N, 3, S, S) to logits (N, K), for any S; meant for 32×32.

    A 3×3 convolution with stride 1 and no pooling (the CIFAR stem); four stages of two basic blocks with w, 2w, 4w and
    8w channels, the first block of each stage but the first with stride 2; average over the image; linear. With batch
    normalization, w = 64 and K = 10 it has 11,173,962 parameters; w = 20 is the slim form of the continual learning
    literature. Parameters are named as torchvision's, with ``norm`` for ``bn``. Weights are drawn as the norm's
    convolutions draw them.

    Where ``norm.residual_alpha`` is a number, the network has the normalizer-free form of
    :mod:`fednorm.models._residual`: blocks of :class:`NFBasicBlock`, no activation after the stem, one before the
    average. The expected variances are those that standard normal images give.

    Args:
        norm: The normalization method.
        num_classes: K.
        width: w.
    """

    def __init__(self, norm: Norm, num_classes: int = 10, width: int = 64) -> None:
        expected = None if norm.residual_alpha is None else ExpectedStd(norm.residual_alpha)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1"] = norm.conv(3, width, 3, padding=1, bias=False)
        layers["norm1"] = norm.layer(width, 2)
        if expected is None:
            layers["act1"] = norm.activation("relu")
        channels_in = width
        for stage in range(_STAGES):
            channels = width * 2**stage
            blocks: list[nn.Module] = []
            for index in range(_BLOCKS):
                stride = 2 if stage > 0 and index == 0 else 1
                if expected is None:
                    blocks.append(BasicBlock(norm, channels_in, channels, stride))
                else:
                    blocks.append(NFBasicBlock(norm, channels_in, channels, stride, expected))
                channels_in = channels
            layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        if expected is not None:
            layers["act1"] = norm.activation("relu")
        layers["average"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["fc"] = nn.Linear(channels_in, num_classes)
        super().__init__(layers)


def _make(norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
    del image_size
    return ResNet18(norm, num_classes, width)


SPEC = ModelSpec(
    name="resnet18",
    summary="3×3 stem, four stages of two basic blocks (w, 2w, 4w, 8w channels), average, linear.",
    citation=Citation(
        title="Deep Residual Learning for Image Recognition",
        authors="He, Zhang, Ren, Sun",
        year=2015,
        arxiv="1512.03385",
        where="CVPR 2016",
    ),
    make=_make,
    input_size=32,
    width=64,
    deviations=(
        "The CIFAR stem (3×3, stride 1, no pooling) for images of every size.",
        "A norm with residual_alpha gets the pre-activation, normalizer-free form of arXiv 2101.08692, with basic "
        "instead of bottleneck blocks and a strided 1×1 shortcut instead of an average pooling before it.",
    ),
)
