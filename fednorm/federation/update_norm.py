"""How far a client's update leads, and which client led the others astray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from fednorm.federation.stack import StackRow

BLOCK = 2**18
"""Values at a time: a block stays in the processor's cache, and no second copy of the model is made."""

SUSPICIOUS = 100.0
"""An update is suspicious that is so many times as long as the median of the others'."""


def update_norm(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    new_flat: Tensor | None = None,
    old_flat: Tensor | None = None,
) -> float:
    """Return how far a client has gone from what it was sent.

        ||new - old||_2  over every floating-point tensor that travels, running statistics included

    Args:
        new: The tensors that a client sent.
        old: The tensors that it was sent.
        new_flat: The former as one vector, if it is there (:func:`~fednorm.federation.flat.flattened`): of a small
            model, whose squares are then summed in float64.
        old_flat: The latter likewise, in the same order; in float64 it need not be made so for every client.

    Returns:
        The Euclidean norm; infinite only where float64 cannot hold it.
    """
    if isinstance(new, StackRow) and math.isfinite(norm := new.stack.norms(old)[new.number]):
        return norm
    if new_flat is not None and old_flat is not None and new_flat.shape == old_flat.shape:
        difference = torch.sub(new_flat, old_flat.double())  # in float64, into which float32 goes exactly
        return math.sqrt(difference.square_().sum().item())  # a dot's last bits depend on where in memory it is
    pairs = [(new[key], old[key]) for key in new if key in old and new[key].is_floating_point()]
    total = sum(_squares(a, b, torch.float32) for a, b in pairs)
    if not math.isfinite(total):  # finite values whose squares are not, or whose differences are not
        total = sum(_squares(a, b, torch.float64) for a, b in pairs)
    return math.sqrt(total)


def _squares(new: Tensor, old: Tensor, least: torch.dtype) -> float:
    """Return the sum of squared differences, in the order of the values whatever the memory's layout."""
    dtype = torch.promote_types(new.dtype, least)
    a, b = new.flatten().to(dtype), old.flatten().to(dtype)
    buffer, total = torch.empty(min(BLOCK, a.numel()), dtype=dtype), 0.0
    for start in range(0, a.numel(), BLOCK):
        part = a[start : start + BLOCK]
        difference = torch.sub(part, b[start : start + BLOCK], out=buffer[: part.numel()])
        total += torch.dot(difference, difference).item()
    return total


def suspect(norms: Mapping[int, float], server_round: int) -> str:
    """Return a sentence that names the client whose update was out of all proportion, or the empty string.

    Args:
        norms: The norm of every update that was averaged, by partition id.
        server_round: The round they are of.
    """
    if len(norms) < 2:
        return ""
    client = max(norms, key=lambda pid: norms[pid])
    usual = median(norm for pid, norm in norms.items() if pid != client)
    if not norms[client] > SUSPICIOUS * usual or not usual:
        return ""
    return (
        f"In round {server_round} the update of client {client} had a norm of {norms[client]:.3g}, the others' median "
        f"is {usual:.3g}: its values, finite as they are, have spoiled the average. rounds.max_update_norm (for "
        f"example {float(format(10 * usual, '.1g')):g}) rejects such an update."
    )
