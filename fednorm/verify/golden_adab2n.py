"""Replay of AdaB2N, recorded with the official layer over three tasks, plain SGD between the steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fednorm.norms.adab2n import AdaB2N, AdaB2NLayer
from fednorm.verify.golden_trace import Comparison, Family, Trace

_LEARNED = ("weight", "bias", "task_weight")


def _is_adab2n(trace: Trace) -> bool:
    return {"kappa", "ada_t0", "num_tasks"} <= set(trace.hparams) and "init.task_weight" in trace.arrays


def _layer(trace: Trace) -> AdaB2NLayer:
    norm = AdaB2N(
        num_tasks=trace.setting("num_tasks"),
        kappa=trace.setting("kappa"),
        lambd=1.0,  # the trace records the loss without its factor
        ada_t0=0,
        eps=trace.setting("eps"),
        momentum=trace.setting("momentum"),
    )
    layer = AdaB2NLayer(trace.setting("C"), norm).double()
    names = (*_LEARNED, "running_mean", "running_var")
    layer.load_state_dict({name: trace.tensor(f"init.{name}") for name in names}, strict=False)
    return layer


def _step(layer: AdaB2NLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    """Run one training step up to the gradients."""
    for name in _LEARNED:
        yield Comparison(f"{step}.{name}", getattr(layer, name).detach().clone(), trace.tensor(f"{step}.{name}"))
    seen = int(trace.tensor(f"{step}.cur_tasks")) + 1
    called = bool(trace.tensor(f"{step}.set_counts_called"))
    layer.set_tasks(trace.tensor(f"{step}.task_ids") if called else None, seen)
    x = trace.tensor(f"{step}.x").requires_grad_()
    y = layer(x)
    loss = layer.penalty()
    assert loss is not None
    ours: dict[str, Tensor] = {
        "y": y.detach(),
        "loss": loss.detach(),
        "eta": torch.tensor(layer.eta, dtype=torch.double),
    }
    if f"{step}.lossonly_grad_x" in trace.arrays:
        grads = torch.autograd.grad(loss, (x, layer.task_weight), retain_graph=True)
        ours |= {"lossonly_grad_x": grads[0], "lossonly_grad_task_weight": grads[1]}
    layer.zero_grad()
    ((y * trace.tensor(f"{step}.gy")).sum() + trace.tensor(f"{step}.lambd") * loss).backward()
    for name, tensor in (("x", x), *((name, getattr(layer, name)) for name in _LEARNED)):
        ours[f"grad_{name}"] = tensor.grad
    ours |= {name: getattr(layer, name).clone() for name in ("running_mean", "running_var")}
    for name, value in ours.items():
        recorded = trace.tensor(f"{step}.{name}")
        yield Comparison(f"{step}.{name}", value.to(recorded.dtype), recorded)
    key = f"{step}.num_batches_tracked"
    yield Comparison(key, layer.num_batches_tracked.clone(), trace.tensor(key), exact=True)
    if seen > 1:
        yield from _counts(layer, x, trace, step)


def _counts(layer: AdaB2NLayer, x: Tensor, trace: Trace, step: str) -> Iterator[Comparison]:
    share, counts = layer._shares(x)
    key = f"{step}.task_counts_extended"
    yield Comparison(key, counts.detach().long(), trace.tensor(key), exact=True)
    key = f"{step}.sample_task_counts"
    yield Comparison(key, (1 / share.max(1).values).round().long(), trace.tensor(key), exact=True)


def _replay(trace: Trace) -> Iterator[Comparison]:
    layer = _layer(trace)
    rate = float(trace.setting("lr"))
    for index in range(int(trace.setting("steps"))):
        yield from _step(layer, trace, f"step{index}")
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
        if f"eval_after_step{index}.x" in trace.arrays:
            layer.eval()
            key = f"eval_after_step{index}.y"
            yield Comparison(key, layer(trace.tensor(f"eval_after_step{index}.x")).detach(), trace.tensor(key))
            layer.train()
    for name in _LEARNED:
        yield Comparison(f"final.{name}", getattr(layer, name).detach().clone(), trace.tensor(f"final.{name}"))


FAMILIES = (Family(method="adab2n", matches=_is_adab2n, replay=_replay),)
