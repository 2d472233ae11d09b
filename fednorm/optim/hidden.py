"""Which weights are hidden: those of a linear layer or a convolution whose output a normalization layer takes.

Who takes whose output is read from the order in which a model registers its modules, as torchvision's, timm's and our
own models register theirs (``conv1, norm1, act1, conv2, norm2``; ``downsample: conv, norm``). No input is needed, and
nothing runs. What the order cannot show:

* A functional call (``F.relu(x)``) and an addition are invisible.
* In a network that is normalized *before* its nonlinearity and convolution (pre-activation blocks, transformers), the
  last layer of a branch is followed by the next block's norm. It counts as hidden, although that norm sees the sum of
  branch and shortcut: the projection then also fixes how large the branch can get.
* ``nn.MultiheadAttention`` keeps weights of its own and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules import conv, pooling

from fednorm.norms import spec_of

WeightLayer = nn.Linear | conv._ConvNd
"""What has a weight that a normalization layer after it makes scale-invariant; private bases cover all dimensions."""

HOMOGENEOUS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU)
"""Nonlinearities with f(c x) = c f(x) for every c > 0. The identity is one too, and is looked through."""

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *HOMOGENEOUS,
    *(nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU),
    *(nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Hardswish, nn.Softplus, nn.Softsign, nn.Tanh),
    *(nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d),
)
"""PyTorch's nonlinearities, with their descendants."""

_LOOKED_THROUGH: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict),  # containers: only empty ones come into question
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveMaxPoolNd, pooling._AdaptiveAvgPoolNd),
)
"""What keeps channels apart and satisfies f(c x) = c f(x): it may stand between a weight and its norm."""


@dataclass(frozen=True, eq=False)
class Place:
    """One of the places where a model has a module.

    Attributes:
        path: The place.
        module: What stands there.
        after: What takes its output, as far as the order of registration tells; None at the end.
    """

    path: str
    module: nn.Module
    after: Place | None = field(repr=False)


@dataclass(frozen=True, eq=False)
class HiddenLayer:
    """A weight layer and the normalization layer that takes its output.

    Attributes:
        path: Of the weight layer.
        layer: The weight layer.
        norm: The normalization layer.
    """

    path: str
    layer: WeightLayer
    norm: nn.Module


def in_order(model: nn.Module) -> list[Place]:
    """Return what computes in a model, in order of registration: every module that is more than a container.

    A module that stands in several places comes several times.
    """
    places: list[Place] = []
    after: Place | None = None
    for path, module in reversed(list(_computing(model, ""))):
        places.append(Place(path, module, after))
        if not isinstance(module, _LOOKED_THROUGH):
            after = places[-1]
    return places[::-1]


def hidden_layers(model: nn.Module) -> list[HiddenLayer]:
    """Return every weight layer that is directly followed by a normalization layer of as many channels.

    The normalization layer may be of any registered method whose card says that it takes the input's scale away (not
    ``dyt``); dropout, pooling and identities may stand between the two. Left out: reparameterized weights (``sws``,
    ``ws_group_norm``, ``torch.nn.utils.parametrize``), whose scale is another's business, and a weight that also serves
    where nothing normalizes it. A shared weight comes once.
    """
    hidden: dict[int, HiddenLayer] = {}
    elsewhere: set[int] = set()
    for place in in_order(model):
        layer, norm = place.module, place.after.module if place.after else None
        if not isinstance(layer, WeightLayer) or "weight" not in layer._parameters or spec_of(layer) is not None:
            continue
        if norm is not None and is_scale_invariant(norm) and _fits(norm, out_channels(layer)):
            hidden.setdefault(id(layer.weight), HiddenLayer(place.path, layer, norm))
        else:
            elsewhere.add(id(layer.weight))
    return [found for key, found in hidden.items() if key not in elsewhere]


def is_normalization(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer of a registered method."""
    spec = spec_of(module)
    return spec is not None and spec.normalizes


def is_scale_invariant(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer to which the length of the weight before it does not matter."""
    spec = spec_of(module)
    return spec is not None and spec.normalizes and spec.scale_invariant


def out_channels(layer: WeightLayer) -> int:
    """Return the number of channels or features that a weight layer puts out."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _computing(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    whole = isinstance(module, WeightLayer | nn.MultiheadAttention)
    if whole or not children or is_normalization(module):
        yield path, module
    if not whole:
        for name, child in children:
            yield from _computing(child, f"{path}.{name}" if path else name)


def _fits(norm: nn.Module, channels: int) -> bool:
    """Return whether a normalization layer is for so many channels, or does not say for how many."""
    shape = getattr(norm, "normalized_shape", None)
    if shape is not None:
        return channels in shape
    return channels == (getattr(norm, "num_channels", None) or getattr(norm, "num_features", channels))
