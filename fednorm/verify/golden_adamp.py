"""Replay of the optimizers that project their update: SGDP and AdamP (clovaai/AdamP)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fednorm.optimizers._radial import remove_radial
from fednorm.optimizers.adamp import AdamP
from fednorm.optimizers.sgdp import SGDP
from fednorm.verify.golden_trace import Comparison, Family, Trace

MOMENTS: Mapping[str, Mapping[str, str]] = {
    "sgdp": {"momentum": "momentum_buffer"},
    "adamp": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
}
"""Of each method, what the trace calls a moment and what the optimizer's state calls it."""


def _is_of(trace: Trace, method: str) -> bool:
    """Return whether a trace holds runs of an optimizer with these moments that projects its update."""
    configs, names = trace.hparams.get("configs"), trace.hparams.get("parameters")
    if not isinstance(configs, Mapping) or not isinstance(names, list) or not configs or not names:
        return False
    kinds = ("param", "grad", "projection", *MOMENTS[method])
    return all(
        isinstance(settings, Mapping)
        and {"delta", "wd_ratio"} <= settings.keys()
        and all(f"{config}.{kind}.{name}" in trace.arrays for kind in kinds for name in names)
        for config, settings in configs.items()
    )


def _optimizer(method: str, parameters: list[nn.Parameter], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    options = dict(settings)
    if method == "sgdp":
        return SGDP(parameters, **options)
    return AdamP(parameters, **{**options, "betas": tuple(options["betas"])})


def _replay(trace: Trace, method: str) -> Iterator[Comparison]:
    for config, settings in trace.setting("configs").items():
        yield from _replay_run(trace, method, config, settings)


def _replay_run(trace: Trace, method: str, config: str, settings: Mapping[str, Any]) -> Iterator[Comparison]:
    names, steps = trace.setting("parameters"), int(trace.setting("steps"))
    recorded = {name: trace.tensor(f"{config}.param.{name}") for name in names}
    gradients = {name: trace.tensor(f"{config}.grad.{name}") for name in names}
    parameters = {name: nn.Parameter(recorded[name][0].clone()) for name in names}
    optimizer = _optimizer(method, list(parameters.values()), settings)
    course: dict[str, list[Tensor]] = {f"param.{name}": [parameters[name].detach().clone()] for name in names}
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step].clone()
            course.setdefault(f"projection.{name}", []).append(_view(parameter, settings))
        optimizer.step()
        for name, parameter in parameters.items():
            course[f"param.{name}"].append(parameter.detach().clone())
            for theirs, ours in MOMENTS[method].items():
                course.setdefault(f"{theirs}.{name}", []).append(optimizer.state[parameter][ours].clone())
    for key, values in course.items():
        exact = key.startswith("projection.")
        yield Comparison(f"{config}.{key}", torch.stack(values), trace.tensor(f"{config}.{key}"), exact=exact)


def _view(parameter: nn.Parameter, settings: Mapping[str, Any]) -> Tensor:
    """Return the view in which a parameter's coming update is projected; 0 for none."""
    weight, gradient = parameter.detach(), parameter.grad
    assert gradient is not None
    view = remove_radial(torch.zeros_like(weight), weight, gradient, delta=settings["delta"], eps=settings["eps"])
    return torch.tensor(view)


FAMILIES = (
    Family(
        method="sgdp (clovaai/AdamP)",
        matches=lambda trace: _is_of(trace, "sgdp"),
        replay=lambda trace: _replay(trace, "sgdp"),
    ),
    Family(
        method="adamp (clovaai/AdamP)",
        matches=lambda trace: _is_of(trace, "adamp"),
        replay=lambda trace: _replay(trace, "adamp"),
    ),
)
