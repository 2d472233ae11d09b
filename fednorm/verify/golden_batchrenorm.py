"""Replay of batch renormalization, recorded with avalanche-lib's layer from given and from its default statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fednorm.errors import DataError
from fednorm.norms.batch_renorm import BatchRenormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace


def _is_batch_renorm(trace: Trace) -> bool:
    return {"r_d_max_inc_step", "max_r_max", "max_d_max"} <= set(trace.hparams) and "gamma" in trace.arrays


def _layer(trace: Trace) -> BatchRenormLayer:
    if (trace.setting("r_max"), trace.setting("d_max")) != (1, 0):
        raise DataError("fednorm's bounds start at r_max = 1 and d_max = 0; the trace's start elsewhere")
    layer = BatchRenormLayer(
        trace.setting("C"),
        r_max=trace.setting("max_r_max"),
        d_max=trace.setting("max_d_max"),
        growth=trace.setting("r_d_max_inc_step"),
        eps=trace.setting("eps"),
        momentum=trace.setting("momentum"),
    ).double()
    names = {"weight": "gamma", "bias": "beta", "running_mean": "init.running_mean", "running_var": "init.running_var"}
    layer.load_state_dict({ours: trace.tensor(theirs).view(-1) for ours, theirs in names.items()}, strict=False)
    return layer


def _gradients(layer: BatchRenormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    x = trace.tensor(f"{step}.x").requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * trace.tensor(f"{step}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad}
    ours |= {"grad_gamma": layer.weight.grad, "grad_beta": layer.bias.grad}
    for name, value in ours.items():
        recorded = trace.tensor(f"{step}.{name}")
        assert value is not None
        yield Comparison(f"{step}.{name}", value.view_as(recorded), recorded)


def _correction(layer: BatchRenormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    """Compare the bounds, and r and d as the layer is about to compute them."""
    r, d = layer.correction(trace.tensor(f"{step}.x"))
    bounds = {"r_max_used": layer.r_bound, "d_max_used": layer.d_bound}
    ours = {name: torch.tensor(value, dtype=torch.double) for name, value in bounds.items()}
    for name, value in {**ours, "r_recomputed": r, "d_recomputed": d}.items():
        yield Comparison(f"{step}.{name}", value, trace.tensor(f"{step}.{name}"))


def _replay(trace: Trace) -> Iterator[Comparison]:
    layer = _layer(trace)
    for index in range(int(trace.setting("steps"))):
        step = f"step{index}"
        yield from _correction(layer, trace, step)
        yield from _gradients(layer, trace, step)
        moments = {"running_avg_mean": layer.running_mean.clone(), "running_avg_std": layer.running_var.sqrt()}
        for name, value in moments.items():
            recorded = trace.tensor(f"{step}.{name}")
            yield Comparison(f"{step}.{name}", value.view_as(recorded), recorded)
    yield from _gradients(layer.eval(), trace, "eval")


FAMILIES = (Family(method="batch_renorm (avalanche-lib)", matches=_is_batch_renorm, replay=_replay),)
