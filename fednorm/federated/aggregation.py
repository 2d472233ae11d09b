"""Averaging what clients sent, by what each tensor is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from flwr.app import Message
from torch import Tensor

from fednorm.federated.pooling import pool_moments
from fednorm.federated.wire import tensor_of
from fednorm.plan import NormPlan
from fednorm.roles import Role


def reject_reason(reply: Message, plan: NormPlan) -> str:
    """Return why a training reply cannot be aggregated, or the empty string.

    Args:
        reply: A client's reply.
        plan: Which tensors, of which shapes, are expected.
    """
    if reason := reject_metrics(reply, at_least=1):
        return reason
    records = reply.content.array_records
    if len(records) != 1:
        return f"expected one ArrayRecord; got {len(records)}"
    arrays = next(iter(records.values()))
    if set(arrays) != set(plan.sent):
        odd = sorted(set(arrays) ^ set(plan.sent))
        return f"expected the {len(plan.sent)} tensors of the plan; these are missing or extra: {', '.join(odd[:5])}"
    for key in plan.sent:
        tensor = tensor_of(arrays[key])
        if tuple(tensor.shape) != plan.by_key[key].shape:
            return f"{key} has shape {tuple(tensor.shape)}; expected {plan.by_key[key].shape}"
        if (dtype := str(tensor.dtype).removeprefix("torch.")) != plan.by_key[key].dtype:
            return f"{key} is of type {dtype}; expected {plan.by_key[key].dtype}"
        if not _finite(tensor):
            return f"{key} has NaN or infinite values"
    return ""


def reject_metrics(reply: Message, *, at_least: int = 0) -> str:
    """Return why a reply's metrics cannot be averaged, or the empty string.

    Args:
        reply: A client's reply.
        at_least: Fewest examples that count.
    """
    if reply.has_error():
        return reply.error.reason or f"error code {reply.error.code}"
    records = reply.content.metric_records
    if len(records) != 1:
        return f"expected one MetricRecord; got {len(records)}"
    examples = next(iter(records.values())).get("num-examples")
    if not isinstance(examples, int | float) or not at_least <= examples < math.inf:
        return f"expected the metric num-examples of {at_least} or more; got {examples!r}"
    return ""


def _finite(tensor: Tensor) -> bool:
    """Return whether every value is finite; a finite sum proves it in one cheap pass."""
    if not tensor.is_floating_point():
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


class Average:
    """A running weighted average of clients' tensors, one client in memory at a time.

    Shared floats are averaged in their own precision, added in the order given. Pooled moments are combined in
    float64 by :func:`~fednorm.federated.pooling.pool_moments`; a pooled quadratic mean has no variance beside it, and
    its weighted average *is* the pooled one. Integers are the first client's.
    """

    def __init__(self, plan: NormPlan) -> None:
        """Prepare for the tensors that ``plan`` sends."""
        self._plan = plan
        self._pairs = [pair for pair in plan.moments() if plan.by_key[pair[1]].role is Role.POOLED]
        self._pooled = {key for pair in self._pairs for key in pair}
        self._floats: list[str] = []
        self._integers: dict[str, Tensor] = {}
        self._sums: list[Tensor] = []
        self._moments: list[dict[str, Tensor]] = []
        self._weights: list[float] = []

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's tensors with a weight > 0; the tensors are not changed."""
        if not self._weights:
            self._integers = {k: tensors[k].clone() for k in self._plan.sent if not tensors[k].is_floating_point()}
            self._floats = [k for k in self._plan.sent if k not in self._integers and k not in self._pooled]
            self._sums = list(torch._foreach_mul([tensors[key] for key in self._floats], weight))
        elif self._floats:
            torch._foreach_add_(self._sums, [tensors[key] for key in self._floats], alpha=weight)
        self._moments.append({key: tensors[key] for key in self._pooled})
        self._weights.append(weight)

    def result(self) -> dict[str, Tensor]:
        """Return the average, in the plan's order; call it once."""
        if self._floats:
            torch._foreach_div_(self._sums, sum(self._weights))
        averaged = dict(zip(self._floats, self._sums, strict=True)) | self._integers | self._pool()
        return {key: averaged[key] for key in self._plan.sent}

    def _pool(self) -> dict[str, Tensor]:
        pooled: dict[str, Tensor] = {}
        for mean_key, var_key in self._pairs:
            means = [moments[mean_key] for moments in self._moments]
            variances = [moments[var_key] for moments in self._moments]
            mean, var = pool_moments(means, variances, self._weights)
            pooled[mean_key], pooled[var_key] = mean.to(means[0].dtype), var.to(variances[0].dtype)
        return pooled
