"""Nearest class mean: classification by the features before a network's head, in place of the head.

    y(x) = argmin over c of || f(x) / ||f(x)|| - mu_c ||,     mu_c a mean of features of class c, of length 1

As ||a - b||^2 = 2 - 2 <a, b> for vectors of length 1, this is argmax over c of <f(x), mu_c>: a head with the weights
mu_c and without a bias. So the network is evaluated with just that head, and what is exported of a run classifies by
it. Classes without a mean get a bias that no other reaches from below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.device import as_written
from fednorm.errors import ConfigError
from fednorm.recognition.places import head_of

NEVER = -1e30
"""The bias of a class without a mean; finite, so that it is no sign of a network that diverged."""


def class_head(model: nn.Module, num_classes: int, learner: str) -> nn.Linear:
    """Return a network's head, whose weights class means can take the place of.

    Args:
        model: The network.
        num_classes: K.
        learner: Who needs it, for the message.

    Raises:
        ConfigError: The last weight layer is not a linear one with a bias and K outputs.
    """
    path = head_of(model)
    head = model.get_submodule(path)
    fits = isinstance(head, nn.Linear) and head.out_features == num_classes and head.bias is not None
    if not fits or "weight" not in head._parameters:
        raise ConfigError(
            f"learner {learner} classifies by class means in the place of the head, and the last weight layer of "
            f"{type(model).__name__}, {path or 'the model itself'!r} ({type(head).__name__}), is no linear layer with "
            f"{num_classes} outputs and a bias. Take a model that ends in one, or another learner."
        )
    assert isinstance(head, nn.Linear)
    return head


class HeadInputs:
    """Hears what a head is given; a context.

    Args:
        head: The head.
        cut: Whether the head is given its inputs without their gradient, so that it learns and nothing before it does.

    Attributes:
        passes: What it was given in each forward pass, shape (n, d), with gradient.
    """

    def __init__(self, head: nn.Linear, *, cut: bool = False) -> None:
        self.head, self.cut = head, cut
        self.passes: list[Tensor] = []

    def __enter__(self) -> HeadInputs:
        """Begin to hear."""
        self._handle = self.head.register_forward_pre_hook(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._handle.remove()

    def _hear(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.passes.append(inputs[0])
        return (inputs[0].detach(), *inputs[1:]) if self.cut else None


@torch.no_grad()
def normalized_features(model: nn.Module, head: nn.Linear, inputs: Tensor, batch_size: int) -> Tensor:
    """Return f / ||f|| of some inputs, in the mode that the network is in, float32, shape (n, d)."""
    with HeadInputs(head) as heard, as_written(model):
        for batch in torch.split(inputs, batch_size):
            model(batch)
    return functional.normalize(torch.cat(heard.passes).float(), dim=1)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the means of features by class, each brought to length 1, and which classes there are.

    Args:
        features: Shape (n, d).
        labels: int64, shape (n,).
        num_classes: K.

    Returns:
        Shape (K, d), zeros for a class without samples; and bool, shape (K,).
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return functional.normalize(sums, dim=1), labels.bincount(minlength=num_classes) > 0


@contextmanager
def with_means(head: nn.Linear, means: Tensor, known: Tensor) -> Iterator[None]:
    """Put class means in the place of a head's weights, and the weights back at the end.

    Args:
        head: The head.
        means: Shape (K, d).
        known: Which classes have a mean, bool, shape (K,).
    """
    before = head.weight.detach().clone(), head.bias.detach().clone()
    with torch.no_grad():
        head.weight.copy_(means)
        head.bias.copy_(torch.where(known, 0.0, NEVER))
    try:
        yield
    finally:
        with torch.no_grad():
            head.weight.copy_(before[0])
            head.bias.copy_(before[1])
