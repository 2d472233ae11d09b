"""Replay of continual normalization, recorded with the official layers of 4 and of 8 groups."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fednorm.norms.continual_norm import ContinualNormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_STATE = ("running_mean", "running_var")


def _is_cn(trace: Trace) -> bool:
    keys = {"weight", "bias", "init.running_mean", "eval.gy", "step0.grad_x"}
    return {"num_groups", "momentum", "steps"} <= set(trace.hparams) and keys <= set(trace.arrays)


def _gradients(layer: ContinualNormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    x = trace.tensor(f"{step}.x").requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * trace.tensor(f"{step}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad}
    ours |= {"grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    for name, value in ours.items():
        assert value is not None
        yield Comparison(f"{step}.{name}", value, trace.tensor(f"{step}.{name}"))


def _replay(trace: Trace) -> Iterator[Comparison]:
    layer = ContinualNormLayer(
        trace.setting("C"),
        num_groups=trace.setting("num_groups"),
        eps=trace.setting("eps"),
        momentum=trace.setting("momentum"),
    ).double()
    state = {name: trace.tensor(name) for name in ("weight", "bias")}
    layer.load_state_dict(state | {name: trace.tensor(f"init.{name}") for name in _STATE}, strict=False)
    for index in range(int(trace.setting("steps"))):
        step = f"step{index}"
        yield from _gradients(layer, trace, step)
        for name in _STATE:
            yield Comparison(f"{step}.{name}", getattr(layer, name).clone(), trace.tensor(f"{step}.{name}"))
    yield from _gradients(layer.eval(), trace, "eval")


FAMILIES = (
    Family(
        method="continual_norm",
        matches=_is_cn,
        replay=_replay,
        note=lambda _: "num_batches_tracked left out: the official layer does not count its batches, ours does",
    ),
)
