"""A small model's tensors as one vector: what is done to each of them in turn costs more than the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLAT = 2**17
"""Values up to which a model is small; a larger one's tensors are not copied for it."""


def flattened(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return all floating-point values one after the other, in the order of the tensors and of their values.

    None where there are none, more than :data:`FLAT`, or some that are not of float32.
    """
    floats, count = [], 0
    for tensor in tensors.values():
        if tensor.dtype is torch.float32:
            count += tensor.numel()
            if count > FLAT:
                return None
            floats.append(tensor.reshape(-1))
        elif tensor.is_floating_point():
            return None
    return torch.cat(floats) if floats else None


def unflattened(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a vector that :func:`flattened` made.

    Args:
        vector: The vector.
        like: Tensors with the same names, shapes and layouts in memory; those that are no floats are left out.
    """
    tensors, at = dict[str, Tensor](), 0
    for key, tensor in like.items():
        if tensor.is_floating_point():
            part = vector[at : at + tensor.numel()].view(tensor.shape)
            tensors[key] = torch.empty_like(tensor).copy_(part)
            at += tensor.numel()
    return tensors


def copied_flat(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Return what :func:`flattened` makes of tensors, and copies of them: the floating-point ones are its parts.

    None where it makes nothing of them, or they are not on the CPU.
    """
    floats, lengths = [], []
    for tensor in tensors.values():
        if not tensor.is_cpu:
            return None
        if tensor.is_floating_point():
            if tensor.dtype is not torch.float32:
                return None
            floats.append(tensor)
            lengths.append(tensor.numel())
    if not 0 < sum(lengths) <= FLAT:
        return None
    vector = torch.empty(sum(lengths))
    parts = [part.view(like.shape) for part, like in zip(torch.split(vector, lengths), floats, strict=True)]
    torch._foreach_copy_(parts, floats)
    each = iter(parts)
    return vector, {k: next(each) if t.is_floating_point() else t.clone() for k, t in tensors.items()}
