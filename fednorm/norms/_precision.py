"""Statistics in single precision, whatever the precision of what is normalized: autocast, and models in half."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

LOW = frozenset({torch.bfloat16, torch.float16})
"""Types in which a sum of squares loses its digits or overflows."""

Layer = TypeVar("Layer", bound=nn.Module)
More = ParamSpec("More")


def widened(values: Tensor) -> Tensor:
    """Return values of half precision as float32, and any others as they are."""
    return values.float() if values.dtype in LOW else values


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on a device; one that does nothing where there is no autocast."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def in_full_precision(
    forward: Callable[Concatenate[Layer, Tensor, More], Tensor],
) -> Callable[Concatenate[Layer, Tensor, More], Tensor]:
    """Make a layer's forward pass compute in float32 where its input is of half precision or autocast is on.

    Autocast picks a type for each operation by its name, which a method's own formula cannot rely on: it is off within.
    As in PyTorch's batch normalization, the output has the type of the input. In single and double precision without
    autocast nothing is changed. The method itself takes :func:`widened` parameters and buffers, for models in half.

    Args:
        forward: Takes the layer and its input, and may take more, which is handed on as it is.
    """

    @functools.wraps(forward)
    def wrapped(layer: Layer, x: Tensor, /, *more: More.args, **named: More.kwargs) -> Tensor:
        device = x.device.type
        if x.dtype not in LOW and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return forward(layer, x, *more, **named)
        with torch.autocast(device, enabled=False):
            return forward(layer, widened(x), *more, **named).to(x.dtype)

    return wrapped
