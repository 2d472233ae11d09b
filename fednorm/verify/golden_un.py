"""Replay of unified normalization, recorded with the official layer, with its filter of outliers and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fednorm.errors import DataError
from fednorm.norms.unified_norm import UnifiedNormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_KEYS = {"weight", "bias", "init.running_var", "init.buffer_x2", "init.buffer_gz", "step0.pad_mask", "eval.gy"}
_STATE = ("running_var", "ema_gz", "buffer_x2", "buffer_gz")
_COUNTS = ("iters", "skip_counter")


def _is_un(trace: Trace) -> bool:
    return {"outlier_filtration", "warmup_iters"} <= set(trace.hparams) and set(trace.arrays) >= _KEYS


def _layer(trace: Trace) -> UnifiedNormLayer:
    window, backward = trace.tensor("init.buffer_x2"), trace.tensor("init.buffer_gz")
    if len(window) != trace.setting("window_size"):
        raise DataError(f"the window has {len(window)} rows, and hparams.window_size is another number")
    layer = UnifiedNormLayer(
        trace.setting("C"),
        window=len(window),
        backward_window=len(backward),
        warmup_iters=trace.setting("warmup_iters"),
        outlier_filtration=trace.setting("outlier_filtration"),
        eps=trace.setting("eps"),
        momentum=1 - trace.setting("momentum"),  # the official one weighs the old value
    ).double()
    state = {name: trace.tensor(name) for name in ("weight", "bias")}
    layer.load_state_dict(state | {name: trace.tensor(f"init.{name}") for name in _STATE}, strict=False)
    return layer


def _pass(layer: UnifiedNormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    x = trace.tensor(f"{step}.x").requires_grad_()
    given = trace.optional(f"{step}.pad_mask_given")
    mask = trace.tensor(f"{step}.pad_mask") if given is not None and bool(given) else None
    layer.zero_grad()
    y = layer(x.transpose(1, 2), mask).transpose(1, 2)  # (B, N, C) to (B, C, N) and back
    (y * trace.tensor(f"{step}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad}
    ours |= {"grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    for name, value in ours.items():
        assert value is not None
        yield Comparison(f"{step}.{name}", value, trace.tensor(f"{step}.{name}"))


def _replay(trace: Trace) -> Iterator[Comparison]:
    layer = _layer(trace)
    skipped, before = [], 0
    for index in range(int(trace.setting("steps"))):
        step = f"step{index}"
        if (jump := trace.setting("jump").get(str(index))) is not None:
            layer.iters.fill_(jump)
        yield from _pass(layer, trace, step)
        for name in (*_STATE, *_COUNTS):
            recorded = trace.tensor(f"{step}.{name}")
            ours = getattr(layer, name).clone().view_as(recorded)
            yield Comparison(f"{step}.{name}", ours, recorded, exact=name in _COUNTS)
        skipped.append(int(layer.skip_counter) - before)
        before = int(layer.skip_counter)
    recorded = torch.tensor(trace.setting("skipped_per_step"))
    yield Comparison("hparams.skipped_per_step", torch.tensor(skipped), recorded, exact=True)
    yield from _pass(layer.eval(), trace, "eval")


FAMILIES = (Family(method="unified_norm", matches=_is_un, replay=_replay),)
