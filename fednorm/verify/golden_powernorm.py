"""Replay of PowerNorm, recorded with the official masked layer: warm-up, after it, with padding, and on features."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fednorm.errors import DataError
from fednorm.norms.power_norm import GROUP_EPS, PowerNormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_KEYS = {"weight", "bias", "init.running_phi", "init.ema_gz", "step0.pad_mask", "eval.gy"}


def _is_power_norm(trace: Trace) -> bool:
    return {"alpha_fwd", "alpha_bkw", "warmup_iters"} <= set(trace.hparams) and set(trace.arrays) >= _KEYS


def _layer(trace: Trace) -> PowerNormLayer:
    if trace.setting("group_scaling_eps") != GROUP_EPS:
        raise DataError(f"fednorm's group scaling has an eps of {GROUP_EPS:g}; the trace's is another")
    layer = PowerNormLayer(
        trace.setting("C"),
        num_groups=trace.setting("group_num"),
        alpha_fwd=trace.setting("alpha_fwd"),
        alpha_bkw=trace.setting("alpha_bkw"),
        warmup_iters=trace.setting("warmup_iters"),
        backward_scale="batch",
        eps=trace.setting("eps"),
    ).double()
    names = {"weight": "weight", "bias": "bias", "running_phi": "init.running_phi", "ema_gz": "init.ema_gz"}
    layer.load_state_dict({ours: trace.tensor(theirs).flatten() for ours, theirs in names.items()}, strict=False)
    return layer


def channels_second(x: Tensor) -> Tensor:
    """Return (T, B, C) as (B, C, T); features (rows, C) as they are."""
    return x.permute(1, 2, 0) if x.ndim == 3 else x


def _pass(layer: PowerNormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    """Compare a forward and a backward pass."""
    x = trace.tensor(f"{step}.x").requires_grad_()
    given = trace.optional(f"{step}.pad_mask_given")
    mask = trace.tensor(f"{step}.pad_mask") if given is not None and bool(given) else None
    layer.zero_grad()
    y = layer(channels_second(x), mask)
    (y * channels_second(trace.tensor(f"{step}.gy"))).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach().permute(2, 0, 1) if x.ndim == 3 else y.detach()}
    ours |= {"grad_x": x.grad, "grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    for name, value in ours.items():
        if f"{step}.{name}" not in trace.arrays and step == "step2d":  # it records no gradient of the parameters
            continue
        assert value is not None
        yield Comparison(f"{step}.{name}", value, trace.tensor(f"{step}.{name}"))


def _state(layer: PowerNormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    for name in ("running_phi", "ema_gz"):
        recorded = trace.tensor(f"{step}.{name}")
        yield Comparison(f"{step}.{name}", getattr(layer, name).clone().view_as(recorded), recorded)


def _group_scaling(layer: PowerNormLayer, trace: Trace) -> Iterator[Comparison]:
    x = trace.tensor("groupscaling.x").requires_grad_()
    y = layer.group_scaled(channels_second(x)).permute(2, 0, 1)
    (y * trace.tensor("groupscaling.gy")).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    for name, value in (("y", y.detach()), ("grad_x", x.grad)):
        yield Comparison(f"groupscaling.{name}", value, trace.tensor(f"groupscaling.{name}"))


def _replay(trace: Trace) -> Iterator[Comparison]:
    layer = _layer(trace)
    for index in range(int(trace.setting("steps"))):
        step = f"step{index}"
        yield from _pass(layer, trace, step)
        yield from _state(layer, trace, step)
        recorded = trace.tensor(f"{step}.iters")
        yield Comparison(f"{step}.iters", layer.iters.clone().view_as(recorded), recorded, exact=True)
    yield from _pass(layer.eval(), trace, "eval")
    yield from _group_scaling(layer, trace)
    if trace.names("step2d."):
        yield from _pass(layer.train(), trace, "step2d")
        yield from _state(layer, trace, "step2d")


FAMILIES = (Family(method="power_norm", matches=_is_power_norm, replay=_replay),)
