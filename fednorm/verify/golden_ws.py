"""Replay of standardized convolutions: scaled (timm, nfnets_pytorch, DeepMind) and unscaled (Qiao et al., timm)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fednorm.norms.sws import SWSConv2d
from fednorm.norms.ws_group_norm import WSConv2d
from fednorm.verify.golden_trace import Comparison, Family, Trace

_LAYER = ("weight", "x", "gy", "y", "grad_x", "grad_weight")


def _has_cases(trace: Trace, *needed: str) -> bool:
    """Return whether the trace holds cases, each with settings of a convolution and the arrays ``needed``."""
    cases = list(trace.cases())
    return bool(cases) and all(
        "kernel_size" in settings and all(f"{name}.{key}" in trace.arrays for key in needed) for name, settings in cases
    )


def _is_timm(trace: Trace) -> bool:
    return _has_cases(trace, *_LAYER) and all("cls" in settings for _, settings in trace.cases())


def _is_floored(trace: Trace) -> bool:
    return _has_cases(trace, *_LAYER, "gain") and "eps" in trace.hparams and not _is_timm(trace)


def _is_unbiased(trace: Trace) -> bool:
    """Return whether a floored trace is nfnets_pytorch's: it alone records the weight handed to the convolution."""
    return any("units_below_eps" in settings for _, settings in trace.cases()) or any(
        key.endswith(".standardized_weight") for key in trace.arrays
    )


def _is_unscaled(trace: Trace) -> bool:
    return _has_cases(trace, "weight", "x", "gy", "imagenet.y", "deeplab.y")


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _geometry(settings: Mapping[str, Any], *, bias: bool) -> dict[str, Any]:
    padding = settings.get("padding", 0)
    return {
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "kernel_size": _pair(settings["kernel_size"]),
        "stride": _pair(settings.get("stride", 1)),
        "padding": 0 if isinstance(padding, str) else _pair(padding),
        "dilation": _pair(settings.get("dilation", 1)),
        "groups": settings.get("groups", 1),
        "bias": bias,
    }


def _tensorflow_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad as TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel at the bottom and right."""
    missing = []
    for size, kernel, stride, dilation in zip(x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True):
        missing.append(max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0))
    rows, columns = missing
    return functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _load(conv: nn.Conv2d, trace: Trace, case: str, *, gamma: float = 1.0) -> None:
    conv.double()
    conv.weight.data = trace.tensor(f"{case}.weight")
    if conv.bias is not None:
        conv.bias.data = trace.tensor(f"{case}.bias")
    if isinstance(conv, SWSConv2d) and conv.gain is not None:
        conv.gain.data = trace.tensor(f"{case}.gain").view_as(conv.gain) * gamma


def _gradients(
    conv: nn.Conv2d, trace: Trace, case: str, variant: str = "", *, same: bool = False, gamma: float = 1.0
) -> Iterator[Comparison]:
    """Run one case forward and backward, and compare what was recorded under ``<case>.<variant>``."""
    x = trace.tensor(f"{case}.x").requires_grad_()
    y = conv(_tensorflow_same(x, conv) if same else x)
    (y * trace.tensor(f"{case}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad, "grad_weight": conv.weight.grad}
    if conv.bias is not None:
        ours["grad_bias"] = conv.bias.grad
    if isinstance(conv, SWSConv2d) and conv.gain is not None and conv.gain.grad is not None:
        # The layer holds gain * gamma, so the gradient of the recorded gain is gamma times ours.
        ours["grad_gain"] = conv.gain.grad * gamma
    prefix = f"{case}.{variant}." if variant else f"{case}."
    for key, value in ours.items():
        recorded = trace.tensor(prefix + key)
        if value is not None:
            yield Comparison(prefix + key, value.view_as(recorded) if key == "grad_gain" else value, recorded)


def _weight(conv: SWSConv2d | WSConv2d, trace: Trace, case: str) -> Iterator[Comparison]:
    recorded = trace.optional(f"{case}.standardized_weight")
    if recorded is not None:
        yield Comparison(f"{case}.standardized_weight", conv.standardized_weight().detach(), recorded)


def _replay_timm(trace: Trace) -> Iterator[Comparison]:
    for case, settings in trace.cases():
        geometry = _geometry(settings, bias=f"{case}.bias" in trace.arrays)
        gamma = float(settings.get("gamma", 1.0))
        conv: SWSConv2d | WSConv2d
        if f"{case}.gain" in trace.arrays:
            conv = SWSConv2d(**geometry, eps=settings["eps"], floor="add")
        else:
            conv = WSConv2d(**geometry, eps=settings["eps"], unbiased=False)
        _load(conv, trace, case, gamma=gamma)
        yield from _weight(conv, trace, case)
        same = isinstance(settings.get("padding"), str)
        yield from _gradients(conv, trace, case, same=same, gamma=gamma)


def _replay_floored(trace: Trace) -> Iterator[Comparison]:
    eps = float(trace.setting("eps"))
    for case, settings in trace.cases():
        geometry = _geometry(settings, bias=f"{case}.bias" in trace.arrays)
        conv = SWSConv2d(**geometry, eps=eps, floor="max", unbiased=_is_unbiased(trace))
        _load(conv, trace, case)
        yield from _weight(conv, trace, case)
        yield from _gradients(conv, trace, case)


def _replay_unscaled(trace: Trace) -> Iterator[Comparison]:
    for case, settings in trace.cases():
        for variant, eps_on in (("imagenet", "variance"), ("deeplab", "deviation")):
            geometry = _geometry(settings, bias=settings.get("bias", True))
            conv = WSConv2d(**geometry, eps=float(trace.hparams.get("eps", 1e-5)), eps_on=eps_on)
            _load(conv, trace, case)
            yield from _gradients(conv, trace, case, variant)


FAMILIES = (
    Family(method="sws (timm)", matches=_is_timm, replay=_replay_timm),
    Family(
        method="sws (nfnets_pytorch)",
        matches=lambda trace: _is_floored(trace) and _is_unbiased(trace),
        replay=_replay_floored,
    ),
    Family(
        method="sws (DeepMind)",
        matches=lambda trace: _is_floored(trace) and not _is_unbiased(trace),
        replay=_replay_floored,
    ),
    Family(method="ws_group_norm (convolution)", matches=_is_unscaled, replay=_replay_unscaled),
)
