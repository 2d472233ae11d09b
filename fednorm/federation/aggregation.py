"""Averaging what clients sent, by what each tensor is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fednorm.federation.flat import unflattened
from fednorm.federation.plan import NormPlan
from fednorm.federation.pooling import pool_moments
from fednorm.federation.stack import StackRow, in_cache, of_each, some_of
from fednorm.roles import Role

HALF = (torch.float16, torch.bfloat16)
"""Types whose sums are held in float64: they have too few bits, and too small a range, for a sum."""

SCALE = 2.0**-100
"""What weights are multiplied by where a sum could leave float64's range; a power of two costs no bit."""


class Average:
    """A running weighted average of clients' tensors, one client in memory at a time.

        w = sum_k n_k w_k / sum_k n_k

    Shared floats are averaged in their own precision, added in the order given; half-precision ones in float64. An
    average of finite values is finite, so a tensor whose sum *could* leave the range of its type (by the largest
    values seen) is summed in float64 from there on. Pooled moments are combined in float64 by
    :func:`~fednorm.federation.pooling.pool_moments`; a pooled quadratic mean has no variance beside it, and its
    weighted average *is* the pooled one. Integers are the first client's. Rows of one stack are summed together, in
    float64.
    """

    def __init__(self, plan: NormPlan) -> None:
        """Prepare for the tensors that ``plan`` sends."""
        self._plan = plan
        self._pairs = [pair for pair in plan.moments() if plan.by_key[pair[1]].role is Role.POOLED]
        self._pooled = tuple(key for pair in self._pairs for key in pair)
        self._types: dict[str, torch.dtype] = {}
        self._integers: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._wide: dict[str, tuple[Tensor, float]] = {}
        self._bounds: dict[str, float] = {}
        self._flat: Tensor | None = None
        self._flat_bound = 0.0
        self._first: Mapping[str, Tensor] = {}
        self._moments: list[Mapping[str, Tensor]] = []
        self._weights: list[float] = []
        self._rows: list[tuple[StackRow, float]] = []
        self._only: Mapping[str, Tensor] | None = None

    def add(self, tensors: Mapping[str, Tensor], weight: float, flat: Tensor | None = None) -> None:
        """Add one client's tensors with a weight > 0; the tensors are not changed.

        Args:
            tensors: The tensors of the plan.
            weight: The client's weight.
            flat: The floating-point ones as one vector (:func:`~fednorm.federation.flat.flattened`), if it is there:
                a small model is summed at once, to the same bits.
        """
        first = not self._weights
        self._only = tensors if first else None
        if first:
            self._integers = {k: tensors[k].clone() for k in self._plan.sent if not tensors[k].is_floating_point()}
            floats = [k for k in self._plan.sent if k not in self._integers and k not in self._pooled]
            self._types = {key: tensors[key].dtype for key in floats}
        if self._rows and (not isinstance(tensors, StackRow) or tensors.stack is not self._rows[0][0].stack):
            self._add_rows()
        if isinstance(tensors, StackRow):
            self._rows.append((tensors, weight))
            self._moments.append(some_of(tensors, self._pooled) if self._pooled else {})
            self._weights.append(weight)
            return
        if not self._add_flat(tensors, weight, flat):
            self._add_each(tensors, weight)
        self._moments.append({key: tensors[key] for key in self._pooled})
        self._weights.append(weight)

    def _add_flat(self, tensors: Mapping[str, Tensor], weight: float, flat: Tensor | None) -> bool:
        """Add all floats at once; return whether that can be done. Else their sum so far is taken apart."""
        if not self._weights and flat is not None:
            self._first = tensors
        elif self._flat is None:
            return False
        bound = self._flat_bound + weight * _largest(flat) if flat is not None and flat.numel() else float("inf")
        if flat is None or not 2 * bound < torch.finfo(flat.dtype).max:
            self._take_apart()
            return False
        self._flat = flat.mul(weight) if self._flat is None else self._flat.add_(flat, alpha=weight)
        self._flat_bound = bound
        return True

    def _take_apart(self) -> None:
        """Go over from one sum of all floats to one of each."""
        if self._flat is not None:
            self._sums = {k: t for k, t in unflattened(self._flat, self._first).items() if k in self._types}
            self._bounds = dict.fromkeys(self._types, self._flat_bound)
            self._flat = None

    def _add_each(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add every float by itself."""
        first = not self._weights
        self._widen(tensors, weight)
        narrow = [key for key in self._types if key not in self._wide]
        if first:
            self._sums = dict(zip(narrow, _products(tensors, narrow, weight), strict=True))
        elif narrow:
            torch._foreach_add_([self._sums[key] for key in narrow], [tensors[key] for key in narrow], alpha=weight)
        for key, (total, scale) in self._wide.items():
            total.add_(tensors[key].to(torch.float64), alpha=weight * scale)

    def result(self) -> dict[str, Tensor]:
        """Return the average, in the plan's order; call it once. Of one client it is the client's, to the bit."""
        if self._only is not None:  # n x / n, rounded twice, is not always x
            return {key: self._only[key].clone() for key in self._plan.sent}
        self._add_rows()
        if self._flat is not None:
            whole = unflattened(self._flat.div_(sum(self._weights)), self._first)
            self._sums = {key: whole[key] for key in self._types}
        elif self._sums:
            torch._foreach_div_(list(self._sums.values()), sum(self._weights))
        averaged = self._sums | self._narrowed() | self._integers | self._pool()
        return {key: averaged[key] for key in self._plan.sent}

    def _add_rows(self) -> None:
        """Add the rows of one stack that have come so far."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        self._take_apart()
        stack, numbers = rows[0][0].stack, [row.number for row, _ in rows]
        weights = torch.tensor([weight for _, weight in rows], dtype=torch.float64)
        whole = numbers == list(range(stack.count))
        for key in self._types:
            if key not in self._wide:
                self._made_wide(key, stack.tensors[key][0], self._types[key])
        for block in stack.blocks:
            scale = SCALE if block.rows.dtype is torch.float64 else 1.0
            sums = _weighted_sum(weights * scale, block.rows if whole else block.rows[numbers])
            for key, part in zip(block.keys, torch.split(sums, list(block.lengths)), strict=True):
                if key in self._types:
                    self._wide[key][0].view(-1).add_(part)

    def _made_wide(self, key: str, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Go over to float64 with one tensor; return its sum so far, and what weights are multiplied by."""
        scale = SCALE if dtype is torch.float64 else 1.0
        so_far = self._sums.pop(key, None)
        total = torch.zeros(like.shape, dtype=torch.float64) if so_far is None else so_far.double()
        self._wide[key] = (total * scale, scale)
        return self._wide[key]

    def _widen(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Go over to float64 with every tensor whose sum may not fit its type with this client's added."""
        for key, dtype in self._types.items():
            if key in self._wide or not tensors[key].numel():
                continue
            self._bounds[key] = self._bounds.get(key, 0.0) + weight * _largest(tensors[key])
            fits = 2 * self._bounds[key] < torch.finfo(dtype).max  # 2: sums are rounded
            if dtype in HALF or not fits:
                self._made_wide(key, tensors[key], dtype)

    def _narrowed(self) -> dict[str, Tensor]:
        """Return the averages that were summed in float64, in their own types."""
        narrowed = {}
        for key, (total, scale) in self._wide.items():
            dtype = self._types[key]
            most = torch.finfo(dtype).max
            narrowed[key] = total.div_(sum(self._weights) * scale).clamp_(-most, most).to(dtype)
        return narrowed

    def _pool(self) -> dict[str, Tensor]:
        pooled: dict[str, Tensor] = {}
        for mean_key, var_key in self._pairs:
            means, variances = (of_each(self._moments, key) for key in (mean_key, var_key))
            mean, var = pool_moments(means, variances, self._weights)
            pooled[mean_key], pooled[var_key] = mean.to(means[0].dtype), var.to(variances[0].dtype)
        return pooled


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return sum_k n_k v_k / sum_k n_k; NaN where all weights are zero.

    A mean of finite numbers is finite: where the plain sums overflow, each weight is made a share first.
    """
    total = sum(weights)
    if not total:
        return float("nan")
    plain = sum(n * v for n, v in zip(weights, values, strict=True)) / total
    return plain if abs(plain) < float("inf") else sum((n / total) * v for n, v in zip(weights, values, strict=True))


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every value of every tensor is finite; a finite sum proves it in one cheap pass."""
    return all(
        bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all())
        for tensor in tensors
        if tensor.is_floating_point()
    )


def _products(tensors: Mapping[str, Tensor], keys: Sequence[str], weight: float) -> list[Tensor]:
    return list(torch._foreach_mul([tensors[key] for key in keys], weight)) if keys else []


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Return sum_k n_k w_k over the rows of a matrix, float64.

    Rows in single precision are summed in it, at the speed at which memory gives them out, unless a sum leaves its
    range: what that rounds, of a few hundred rows, is less than what rows of one after the other are rounded.
    """
    if rows.dtype is torch.float32:
        power = 2.0 ** math.frexp(float(weights.max()))[1]  # shares of at most 1, of as many bits
        total = ((weights / power).float() @ rows).double()
        if total.isfinite().all():
            return total.mul_(power)
    parts = in_cache(rows)
    shares = torch.split(weights, [len(part) for part in parts])
    return torch.stack([share @ part.double() for part, share in zip(parts, shares, strict=True)]).sum(0)


def _largest(tensor: Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item())
