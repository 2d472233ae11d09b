"""Replay of task-balanced batch normalization, recorded with the official layer over four tasks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fednorm.norms.task_balanced_norm import TaskBalancedNormLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_STATE = ("running_mean", "running_var")


def _is_tbbn(trace: Trace) -> bool:
    return {"batch_ratio", "B_c", "B_p", "tasks"} <= set(trace.hparams) and "step0.num_splits" in trace.arrays


def _step(layer: TaskBalancedNormLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    task = int(trace.tensor(f"{step}.task"))
    # Which earlier tasks the memory is of was not recorded and does not matter.
    tasks = torch.tensor([task] * int(trace.setting("B_c")) + [max(task - 1, 0)] * int(trace.setting("B_p")))
    layer.set_tasks(tasks, task + 1)
    x = trace.tensor(f"{step}.x").requires_grad_()
    parts = torch.tensor(layer.division(len(x))[1])
    yield Comparison(f"{step}.num_splits", parts, trace.tensor(f"{step}.num_splits"), exact=True)
    layer.zero_grad()
    y = layer(x)
    (y * trace.tensor(f"{step}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad}
    ours |= {"grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    ours |= {name: getattr(layer, name).clone() for name in _STATE}
    for name, value in ours.items():
        assert value is not None
        yield Comparison(f"{step}.{name}", value, trace.tensor(f"{step}.{name}"))
    key = f"{step}.num_batches_tracked"
    yield Comparison(key, layer.num_batches_tracked.clone(), trace.tensor(key), exact=True)


def _replay(trace: Trace) -> Iterator[Comparison]:
    layer = TaskBalancedNormLayer(
        trace.setting("C"),
        batch_ratio=trace.setting("batch_ratio"),
        eps=trace.setting("eps"),
        momentum=trace.setting("momentum"),
    ).double()
    state = {name: trace.tensor(name) for name in ("weight", "bias")}
    layer.load_state_dict(state | {name: trace.tensor(f"init.{name}") for name in _STATE}, strict=False)
    for index in range(len(trace.setting("tasks"))):
        yield from _step(layer, trace, f"step{index}")
    yield Comparison("eval.y", layer.eval()(trace.tensor("eval.x")).detach(), trace.tensor("eval.y"))


FAMILIES = (Family(method="task_balanced_norm", matches=_is_tbbn, replay=_replay),)
