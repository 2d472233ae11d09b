"""The multilayer perceptron of NaP's continual memorization: four hidden layers, a norm before each nonlinearity."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fednorm.cards import Citation
from fednorm.chain import Chain
from fednorm.models import ModelSpec
from fednorm.spec import Norm

_DEPTH = 4
_WIDTH = 512


class MLP(Chain):
    """Images (N, 3, S, S) to logits (N, K).

    The image is flattened to 3·S² numbers; then four times linear, norm over (N, C), ReLU, each to ``width`` features;
    then the classifier. Linear layers have a bias although a norm follows: a method for which it is redundant takes it
    away (:meth:`~fednorm.spec.Norm.prepare`). Weights are drawn as PyTorch's layers draw them.

    With width 512, S = 32 and K = 10 it has 2,366,474 parameters, and 4,096 more where the norm has a scale and a
    shift for each feature.

    Args:
        norm: The normalization method.
        num_classes: K.
        image_size: S.
        width: Features of every hidden layer.
    """

    name = "mlp"

    def __init__(self, norm: Norm, num_classes: int = 10, image_size: int = 32, width: int = _WIDTH) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["flatten"] = nn.Flatten()
        features = 3 * image_size**2
        for i in range(1, _DEPTH + 1):
            layers[f"fc{i}"] = nn.Linear(features, width)
            layers[f"norm{i}"] = norm.layer(width, 0)
            layers[f"act{i}"] = norm.activation("relu")
            features = width
        layers[f"fc{_DEPTH + 1}"] = nn.Linear(features, num_classes)
        super().__init__(layers, image_size)


def _make(norm: Norm, *, num_classes: int, image_size: int, width: int) -> nn.Module:
    return MLP(norm, num_classes, image_size, width)


SPEC = ModelSpec(
    name="mlp",
    summary="Four linear layers of 512 features, a norm and ReLU after each, then a linear classifier.",
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
        "The paper's depth of 4 is read as four hidden layers.",
        "PyTorch's initial weights; the paper does not state its own.",
        "A width other than 512 scales every hidden layer; the paper has no such option.",
    ),
)
