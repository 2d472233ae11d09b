"""Replay of batch-channel normalization, recorded with the official layers: by the batch, and by estimates."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fednorm.errors import DataError
from fednorm.norms.batch_channel_norm import BatchChannelNormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_PARAMETERS = {
    "weight": "bn_weight", "bias": "bn_bias", "group_weight": "group_weight", "group_bias": "group_bias",
}  # fmt: skip
_MOMENTS = ("running_mean", "running_var")


def _is_bcn(trace: Trace, statistics: str) -> bool:
    needed = "bn_momentum" if statistics == "batch" else "moving_speeds"
    keys = {*_PARAMETERS.values(), "init.running_mean", "init.running_var", "eval.gy"}
    return {needed, "num_groups", "steps"} <= set(trace.hparams) and keys <= set(trace.arrays)


def _is_batch(trace: Trace) -> bool:
    return _is_bcn(trace, "batch")


def _is_estimate(trace: Trace) -> bool:
    return _is_bcn(trace, "estimate")


def _layer(trace: Trace, statistics: str) -> BatchChannelNormLayer:
    eps = trace.setting("eps")
    if trace.setting("eps_bn") != eps:
        raise DataError("fednorm's batch-channel norm has one eps for both halves; the trace has two")
    layer = BatchChannelNormLayer(
        trace.setting("C"),
        num_groups=trace.setting("num_groups"),
        statistics=statistics,
        eps=eps,
        momentum=trace.setting("bn_momentum") if statistics == "batch" else 0.0,
    ).double()
    names = _PARAMETERS | {name: f"init.{name}" for name in _MOMENTS}
    layer.load_state_dict({ours: trace.tensor(theirs).flatten() for ours, theirs in names.items()}, strict=False)
    return layer


def _pass(layer: BatchChannelNormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    x = trace.tensor(f"{step}.x").requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * trace.tensor(f"{step}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad}
    ours |= {f"grad_{theirs}": getattr(layer, name).grad for name, theirs in _PARAMETERS.items()}
    for name, value in ours.items():
        recorded = trace.tensor(f"{step}.{name}")
        assert value is not None
        yield Comparison(f"{step}.{name}", value.view_as(recorded), recorded)


def _replay(trace: Trace, statistics: str) -> Iterator[Comparison]:
    layer = _layer(trace, statistics)
    for index in range(int(trace.setting("steps"))):
        step = f"step{index}"
        if statistics == "estimate":
            layer.momentum = float(trace.tensor(f"{step}.moving_speed"))
        yield from _pass(layer, trace, step)
        for name in _MOMENTS:
            yield Comparison(f"{step}.{name}", getattr(layer, name).clone(), trace.tensor(f"{step}.{name}"))
    yield from _pass(layer.eval(), trace, "eval")


FAMILIES = (
    Family(method="batch_channel_norm", matches=_is_batch, replay=lambda trace: _replay(trace, "batch")),
    Family(
        method="batch_channel_norm (estimate)", matches=_is_estimate, replay=lambda trace: _replay(trace, "estimate")
    ),
)
