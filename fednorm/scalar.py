"""Numbers as tensors, made once.

PyTorch makes a tensor of every Python number that stands in an operation: on a handful of values ``x * 0.5`` takes two
to three times as long as ``x * half``, and such operations are most of what a small network's step consists of.
"""

from __future__ import annotations

from math import copysign

import torch
from torch import Tensor, nn

_MADE: dict[tuple[float, float, torch.dtype, torch.device], Tensor] = {}

_EXACT = (torch.float32, torch.float64)
"""Types whose operations round a number to the type before they use it."""

MOST = 1024
"""Numbers that are kept: some are a run's options."""


def scalar(value: float, like: Tensor) -> Tensor | float:
    """Return a number for an operation with a tensor: as a tensor without dimensions, of its type and on its device.

    The operation has the bits of one with the number itself. The tensor is kept, and not to be written to.

    Args:
        value: The number.
        like: The tensor. For one in half precision, whose operations take numbers as they are, and for one of a mode of
            PyTorch's own (fake, functional) the number is returned.
    """
    if like.dtype not in _EXACT or (type(like) is not Tensor and type(like) is not nn.Parameter):
        return value
    key = value, copysign(1.0, value), like.dtype, like.device  # -0 equals 0
    made = _MADE.get(key)
    if made is None:
        if len(_MADE) >= MOST:
            _MADE.clear()
        with torch.inference_mode(False):
            made = torch.full((), value, dtype=like.dtype, device=like.device)
        if type(made) is Tensor:
            _MADE[key] = made
    return made
