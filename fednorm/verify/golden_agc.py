"""Replay of adaptive gradient clipping: alone (timm, DeepMind) and before SGD (nfnets_pytorch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fednorm.optim.agc import Units, clip_gradients
from fednorm.verify.golden_trace import Comparison, Family, Trace


def _is_clip(trace: Trace, setting: str) -> bool:
    return {setting, "eps"} <= trace.hparams.keys() and all(
        trace.names(prefix) for prefix in ("param.", "grad_in.", "grad_out.")
    )


def _is_sgd(trace: Trace) -> bool:
    return {"clipping", "eps", "lr", "momentum"} <= trace.hparams.keys() and all(
        trace.names(prefix) for prefix in ("init.", "step0.grad.", "step0.param.")
    )


def _replay_clip(trace: Trace, setting: str, units: Units) -> Iterator[Comparison]:
    parameters = {name: nn.Parameter(trace.tensor(f"param.{name}")) for name in trace.names("param.")}
    for name, parameter in parameters.items():
        parameter.grad = trace.tensor(f"grad_in.{name}")
    if trace.hparams.get("norm_type", 2.0) != 2.0:
        raise ValueError(f"fednorm clips by the Euclidean norm; the trace has norm_type {trace.hparams['norm_type']}")
    clip_gradients(parameters.values(), float(trace.setting(setting)), float(trace.setting("eps")), units=units)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            yield Comparison(f"grad_out.{name}", parameter.grad, trace.tensor(f"grad_out.{name}"))


def _replay_sgd(trace: Trace) -> Iterator[Comparison]:
    parameters = {name: nn.Parameter(trace.tensor(f"init.{name}")) for name in trace.names("init.")}
    optimizer = torch.optim.SGD(
        parameters.values(),
        lr=trace.setting("lr"),
        momentum=trace.setting("momentum"),
        dampening=trace.hparams.get("dampening", 0.0),
        weight_decay=trace.hparams.get("weight_decay", 0.0),
        nesterov=trace.hparams.get("nesterov", False),
    )
    step = 0
    while trace.names(f"step{step}.grad."):
        for name, parameter in parameters.items():
            parameter.grad = trace.tensor(f"step{step}.grad.{name}")
        clip_gradients(parameters.values(), float(trace.setting("clipping")), float(trace.setting("eps")))
        optimizer.step()
        for name, parameter in parameters.items():
            key = f"step{step}.param.{name}"
            yield Comparison(key, parameter.detach().clone(), trace.tensor(key))
            recorded = trace.optional(f"step{step}.momentum_buffer.{name}")
            if recorded is not None:
                buffer = optimizer.state[parameter]["momentum_buffer"]
                yield Comparison(f"step{step}.momentum_buffer.{name}", buffer.clone(), recorded)
        step += 1


FAMILIES = (
    Family(
        method="agc (timm)",
        matches=lambda trace: _is_clip(trace, "clip_factor"),
        replay=lambda trace: _replay_clip(trace, "clip_factor", "timm"),
    ),
    Family(
        method="agc (DeepMind)",
        matches=lambda trace: _is_clip(trace, "clip"),
        replay=lambda trace: _replay_clip(trace, "clip", "deepmind"),
    ),
    Family(method="agc with sgd (nfnets_pytorch)", matches=_is_sgd, replay=_replay_sgd),
)
