"""Feature normalization: the input of a network's head is brought to one length, on any network.

Zhang, Beitollahi, Bie, Chen. Understanding the Role of Layer Normalization in Label-Skewed Federated Learning. TMLR
2024. https://arxiv.org/abs/2308.09565 (FN); Kim, Lee, Oh, Yun. FedFN: Feature Normalization for Alleviating Data
Heterogeneity Problem in Federated Learning. 2023. https://arxiv.org/abs/2311.13267 (FedFN)

    f <- sqrt(d) f / ||f||_2                    f in R^d: what the last weight layer is given of one sample

Under label skew most of what layer normalization gains in a federation comes from this one step. It has no tensors: a
state dict, a norm plan and a file of weights are those of the network without it. Features of length 0 stay 0. Where
the head is a convolution, f is the vector of channels at each position.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from fednorm.errors import ConfigError
from fednorm.norms._precision import widened
from fednorm.recognition.places import head_of
from fednorm.rng import torch_seeded

REMEDY = (
    "Leave model.feature_norm out, or give the network one last weight layer (nn.Linear or a convolution) that makes "
    "the logits and is called once."
)


def normalized_features(features: Tensor, axis: int = -1) -> Tensor:
    """Return sqrt(d) f / ||f||_2, of the shape and type of ``features``; 0 stays 0.

    Args:
        features: f along one axis, of length d.
        axis: That axis.
    """
    wide = widened(features)
    return (functional.normalize(wide, dim=axis) * math.sqrt(features.shape[axis])).to(features.dtype)


class FeatureNorm:
    """The hook before a head: it normalizes what the head is given."""

    def __call__(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the head's inputs, the first of them normalized; the axis counts from the end: no batch is needed."""
        axis = -1 - len(head.kernel_size) if isinstance(head, _ConvNd) else -1
        return normalized_features(inputs[0], axis), *inputs[1:]


def normalize_features(model: nn.Module, num_classes: int, shape: tuple[int, ...]) -> str:
    """Put feature normalization before a network's head, in place.

    Args:
        model: The network.
        num_classes: K, the number of logits.
        shape: Of some images that the network takes, (N, C, H, W), two or more.

    Returns:
        What to say of it, a sentence.

    Raises:
        ConfigError: The last weight layer by module order does not make the logits, or is not called once.
    """
    path = head_of(model)
    head, name = model.get_submodule(path), f"{path or 'the model itself'!r}"
    outputs = head.out_channels if isinstance(head, _ConvNd) else getattr(head, "out_features", 0)
    if outputs != num_classes:
        raise ConfigError(
            f"model.feature_norm normalizes what the head is given, and which part of {type(model).__name__} is its "
            f"head cannot be told: its last weight layer by module order, {name}, has {outputs} outputs, and there are "
            f"{num_classes} classes. {REMEDY}"
        )
    _require_called_once(model, head, name, shape)
    head.register_forward_pre_hook(FeatureNorm())
    return f"The features before its head, {name}, are brought to the length sqrt(d) (model.feature_norm)."


def _require_called_once(model: nn.Module, head: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a head whose forward is not what makes the logits: a layer whose weight is used by hand, or used twice."""
    calls: list[int] = []
    mark = head.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        try:
            with torch.no_grad():
                copy.deepcopy(model).to("meta").eval()(torch.zeros(shape, device="meta"))
        except Exception:  # the meta device has no numbers to compute with: where a network looks at some
            calls.clear()
            with torch_seeded(0, "dry"), torch.no_grad():
                copy.deepcopy(model).eval()(torch.zeros(shape))
    finally:
        mark.remove()
    if len(calls) != 1:
        raise ConfigError(
            f"model.feature_norm normalizes what the head is given, and {name} of {type(model).__name__}, its last "
            f"weight layer by module order, is called {len(calls)} times in one forward pass. {REMEDY}"
        )
