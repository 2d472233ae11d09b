"""Whether two copies of a model have the same constants, told from two numbers a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fednorm.federation.plan import NormPlan
from fednorm.roles import Role

TOLERANCE = 1e-4
"""What may differ, relative to a tensor's norm: one library's cosine is not another's in the last digits."""


def constant_prints(model: nn.Module, plan: NormPlan) -> dict[str, list[float]]:
    """Return a print of every constant: its inner product with a fixed sequence, and its Euclidean norm, by key.

        print(c) = (sum_i c_i cos(i), sqrt(sum_i c_i^2)),   i = 1 .. n, in float64

    Constants on the meta device, which have no values, have none.
    """
    state = model.state_dict()
    prints = {}
    for key in plan.keys(Role.CONSTANT):
        if state[key].device.type != "meta":
            prints[key] = _print(state[key])
    return prints


def _print(constant: Tensor) -> list[float]:
    values = constant.detach().cpu().double().flatten()
    values = values.nan_to_num(posinf=1e300, neginf=-1e300) if constant.is_floating_point() else values
    product = values @ torch.arange(1, len(values) + 1, dtype=torch.float64).cos()
    return [product.item(), torch.linalg.vector_norm(values).item()]


def differing(own: Mapping[str, list[float]], other: Mapping[str, object]) -> str:
    """Return the key of the first constant whose prints differ by more than the tolerance; empty where none does."""
    for key, (product, norm) in own.items():
        match other.get(key):
            case [int() | float() as their_product, int() | float() as their_norm]:
                room = TOLERANCE * max(norm, 1e-12)
                if abs(product - their_product) <= room and abs(norm - their_norm) <= room:
                    continue
        return key
    return ""
