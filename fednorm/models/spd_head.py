"""A convolutional network that classifies by the covariance of its features, normalized as the matrix that it is.

The one place for the batch normalization of symmetric positive definite matrices in an image classifier: see
:mod:`fednorm.norms._bures_wasserstein` (GBWBN, https://arxiv.org/abs/2504.00660). The paper's networks are given
covariances as data (SPDNet); here a small network makes them.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from fednorm import options
from fednorm.cards import Citation
from fednorm.chain import Chain
from fednorm.models import ModelSpec
from fednorm.norms._bures_wasserstein import BuresWassersteinNorm, logarithm
from fednorm.spec import Norm

REGULAR = 1e-4
"""Added to the diagonal of a covariance, as the official code does: few positions leave it singular."""


class CovariancePooling(nn.Module):
    """Maps features (N, n, H, W) to the covariance of their channels over positions, (N, n, n) in float64.

    X = 1/P sum_p (f_p - mean f)(f_p - mean f)^T + 1e-4 I, with P = H·W.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return the covariances."""
        rows = features.flatten(2).double()
        rows = rows - rows.mean(2, keepdim=True)
        eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        return rows @ rows.mT / rows.shape[2] + REGULAR * eye


class LogEuclidean(nn.Module):
    """Maps matrices (N, n, n) to the n(n+1)/2 entries of their logarithm, those beside the diagonal times sqrt(2).

    So the length of the vector is the Frobenius norm of the logarithm. The result is float32.
    """

    def forward(self, matrices: Tensor) -> Tensor:
        """Return the vectors."""
        log = logarithm(matrices)
        i, j = torch.triu_indices(*log.shape[-2:], device=log.device)
        return (log[:, i, j] * torch.where(i == j, 1.0, 2**0.5)).float()


class SPDHead(Chain):
    """Images (N, 3, S, S) to logits (N, K).

    Three times convolution (3×3), norm, ReLU, to w, w and 2w channels, the first two followed by 2×2 max-pooling; a
    1×1 convolution to n channels; their covariance over positions; GBWBN; its logarithm; the classifier.

    Args:
        norm: The normalization method of the convolutions.
        num_classes: K.
        image_size: S, a multiple of 4.
        width: w.
        channels: n.
        spd_norm: Whether the covariances are normalized: without it, the control.
        theta: GBWBN's power.
    """

    name = "spd_head"

    def __init__(
        self,
        norm: Norm,
        num_classes: int = 10,
        image_size: int = 28,
        width: int = 32,
        *,
        channels: int = 16,
        spd_norm: bool = True,
        theta: float = 1.0,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inputs, outputs) in enumerate(((3, width), (width, width), (width, 2 * width)), start=1):
            layers[f"conv{i}"] = norm.conv(inputs, outputs, 3, padding=1, bias=False)
            layers[f"norm{i}"] = norm.layer(outputs, 2)
            layers[f"act{i}"] = norm.activation("relu")
            if i < 3:
                layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["project"] = nn.Conv2d(2 * width, channels, 1)
        layers["covariance"] = CovariancePooling()
        if spd_norm:
            layers["spd_norm"] = BuresWassersteinNorm(channels, theta=theta)
        layers["log"] = LogEuclidean()
        layers["fc"] = nn.Linear(channels * (channels + 1) // 2, num_classes)
        super().__init__(layers, image_size)


def _make(
    norm: Norm,
    *,
    num_classes: int,
    image_size: int,
    width: int,
    channels: int = 16,
    spd_norm: bool = True,
    theta: float = 1.0,
) -> nn.Module:
    options.whole("spd_head", "channels", channels, at_least=2)
    options.flag("spd_head", "spd_norm", spd_norm)
    return SPDHead(norm, num_classes, image_size, width, channels=channels, spd_norm=spd_norm, theta=theta)


SPEC = ModelSpec(
    name="spd_head",
    summary="3 convolutions, the covariance of n channels over positions, GBWBN of that matrix, its logarithm, linear.",
    citation=Citation(
        title="Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry",
        authors="Wang et al.",
        year=2025,
        arxiv="2504.00660",
        where="CVPR 2025; the head is ours: the paper's networks are given covariances as data",
    ),
    make=_make,
    input_size=28,
    min_size=8,
    size_step=4,
    width=32,
    deviations=(
        "metric and shift are exponentials of symmetric matrices, the running mean is kept as its logarithm: any "
        "optimizer, and any average over clients, keeps them positive definite",
    ),
)
