"""Replay of dynamic tanh: three steps of training in both memory layouts, and the official conversion."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fednorm.conversion import convert
from fednorm.conversion.replacement import ChannelsLast
from fednorm.norms.dyt import DyTLayer
from fednorm.norms.layer_norm import ChannelLayerNorm
from fednorm.verify.golden_trace import Comparison, Family, Trace

_TENSORS = ("alpha", "weight", "bias")


def _is_dyt(trace: Trace) -> bool:
    keys = {f"{layout}.init.{name}" for layout in ("channels_last", "channels_first") for name in _TENSORS}
    return {"alpha_init_value", "num_features", "lr", "steps"} <= set(trace.hparams) and keys <= set(trace.arrays)


def _training(trace: Trace, layout: str) -> Iterator[Comparison]:
    """Train one layer as the trace did, from its first step's tensors: tensors before a step, output, gradients."""
    layer = DyTLayer(trace.setting("num_features"), alpha_init=trace.setting("alpha_init_value")).double()
    tensors = dict(layer.named_parameters())
    for name in _TENSORS:
        initial = tensors[name].detach().clone()
        yield Comparison(f"{layout}.init.{name}", initial, trace.tensor(f"{layout}.init.{name}"))
        tensors[name].data = trace.tensor(f"{layout}.step0.{name}")
    optimizer = torch.optim.SGD(layer.parameters(), lr=trace.setting("lr"))
    called = ChannelsLast(layer) if layout == "channels_last" else layer
    for index in range(int(trace.setting("steps"))):
        step = f"{layout}.step{index}"
        for name in _TENSORS if index else ():
            yield Comparison(f"{step}.{name}", tensors[name].detach().clone(), trace.tensor(f"{step}.{name}"))
        x = trace.tensor(f"{step}.x").requires_grad_()
        optimizer.zero_grad()
        y = called(x)
        (y * trace.tensor(f"{step}.gy")).sum().backward()
        grads: dict[str, Tensor | None] = {"grad_x": x.grad} | {f"grad_{name}": tensors[name].grad for name in _TENSORS}
        yield Comparison(f"{step}.y", y.detach(), trace.tensor(f"{step}.y"))
        for name, grad in grads.items():
            assert grad is not None
            yield Comparison(f"{step}.{name}", grad.clone(), trace.tensor(f"{step}.{name}"))
        optimizer.step()


def _network(trace: Trace) -> nn.Sequential:
    """Return the network that was converted: linear layers where the trace has matrices, layer normalization between.

    The trace's names are those of nested ``nn.Sequential``: a linear layer, a layer normalization, and a part of a
    layer normalization without scale and shift and a linear layer.
    """
    state = {name: trace.tensor(f"convert.before.{name}") for name in trace.names("convert.before.")}
    first, last = state["0.weight"], state["2.1.weight"]
    features = trace.setting("num_features")
    model = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0]),
        nn.LayerNorm(features),
        nn.Sequential(nn.LayerNorm(features, elementwise_affine=False), nn.Linear(last.shape[1], last.shape[0])),
    ).double()
    model.load_state_dict(state)
    return model


def _conversion(trace: Trace) -> Iterator[Comparison]:
    options = {"alpha_init": trace.setting("convert_alpha_init")}
    converted = convert(_network(trace), "dyt", **options)
    with torch.no_grad():
        yield Comparison("convert.y", converted(trace.tensor("convert.x")), trace.tensor("convert.y"))
        x = trace.tensor("convert2d.x")
        maps = convert(ChannelLayerNorm(x.shape[1]).double(), "dyt", **options)(x)
        yield Comparison("convert2d.y", maps, trace.tensor("convert2d.y"))
    # Ours wraps a layer whose channels are last: "1.layer.alpha" is the official "1.alpha".
    ours = {key.replace(".layer.", "."): tensor for key, tensor in converted.state_dict().items()}
    for name in trace.names("convert.after."):
        yield Comparison(f"convert.after.{name}", ours[name], trace.tensor(f"convert.after.{name}"), exact=True)


def _replay(trace: Trace) -> Iterator[Comparison]:
    for layout in ("channels_last", "channels_first"):
        yield from _training(trace, layout)
    yield from _conversion(trace)


FAMILIES = (Family(method="dyt", matches=_is_dyt, replay=_replay),)
