"""Replay of hybrid batch normalization: the official layer, and two rounds of its second pass and server merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fednorm.federation.aggregation import Average
from fednorm.federation.plan import norm_plan
from fednorm.norms.hybrid_bn import IMAGES, Estimate, HybridBNLayer, hybrid_layers, measured, pooled_estimates
from fednorm.roles import RoleRule
from fednorm.verify.golden_trace import Comparison, Family, Trace

_LEARNED = ("weight", "bias", "distribution_factor")
_RUNNING = {"running_mean": "global_mean", "running_var": "global_var"}
"""Our names of the moments of all clients, and the official ones."""
_SUMS = {"mean": "running_mean", "var": "running_var"}
"""Our names of what the second pass adds up, and the official ones."""
FROZEN = -1.0
"""The official count that stops the sums."""


def _is_layer(trace: Trace) -> bool:
    keys = {*_LEARNED, "global_mean", "global_var", "step0.before.running_num"}
    return "phase_per_step" in trace.hparams and keys <= set(trace.arrays)


def _is_merge(trace: Trace) -> bool:
    return {"avg_momentum_round", "client_weights", "sizes"} <= set(trace.hparams) and "client0.data" in trace.arrays


# The layer ------------------------------------------------------------------------------------------------------------


def _layer(trace: Trace) -> HybridBNLayer:
    layer = HybridBNLayer(trace.setting("C"), eps=trace.setting("eps"), momentum=0.0).double()
    names = {**dict.fromkeys(_LEARNED), **_RUNNING}
    layer.load_state_dict({ours: trace.tensor(theirs or ours) for ours, theirs in names.items()}, strict=False)
    return layer


def _step(layer: HybridBNLayer, trace: Trace, step: str) -> Iterator[Comparison]:
    count, *moments = (trace.tensor(f"{step}.before.running_{name}") for name in ("num", "mean", "var"))
    own = Estimate(float(count), *moments)
    layer.estimate = None if own.count == FROZEN else own
    x = trace.tensor(f"{step}.x").requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * trace.tensor(f"{step}.gy")).sum().backward()
    ours: dict[str, Tensor | None] = {"y": y.detach(), "grad_x": x.grad}
    ours |= {f"grad_{name}": getattr(layer, name).grad for name in _LEARNED}
    ours |= {"running_num": torch.tensor([own.count], dtype=torch.double)}
    ours |= {theirs: getattr(own, name) for name, theirs in _SUMS.items()}
    for name, value in ours.items():
        assert value is not None
        yield Comparison(f"{step}.{name}", value, trace.tensor(f"{step}.{name}"))


def _replay_layer(trace: Trace) -> Iterator[Comparison]:
    layer = _layer(trace)
    for index in range(len(trace.setting("phase_per_step"))):
        yield from _step(layer, trace, f"step{index}")
    yield Comparison("eval.y", layer.eval()(trace.tensor("eval.x")).detach(), trace.tensor("eval.y"))


# The merge ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """The network of the trace, of the shapes of its state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.conv1 = _conv(state["conv1.weight"])
        self.hbn1 = HybridBNLayer(len(state["hbn1.weight"]), eps=1e-5, momentum=0.0)
        self.conv2 = _conv(state["conv2.weight"])
        self.hbn2 = HybridBNLayer(len(state["hbn2.weight"]), eps=1e-5, momentum=0.0)
        classes, features = state["fc.weight"].shape
        self.fc = nn.Linear(features, classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.hbn1(self.conv1(x)).relu()
        logits: Tensor = self.fc(self.hbn2(self.conv2(x)).relu().mean((2, 3)))
        return logits

    def take(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Take the official state dict of all clients, and what is a client's own."""
        ours = {ours: state[theirs] for ours, theirs in _names(self).items()}
        self.load_state_dict(ours | dict(own), strict=False)


def _conv(weight: Tensor) -> nn.Conv2d:
    out_channels, in_channels, *kernel = weight.shape
    return nn.Conv2d(in_channels, out_channels, (kernel[0], kernel[1]))


def _names(net: nn.Module) -> dict[str, str]:
    """Return the official name of every tensor of ours that the official network has too."""
    layers, names = hybrid_layers(net), {}
    for key in net.state_dict():
        path, _, name = key.rpartition(".")
        if name != "num_batches_tracked":
            names[key] = f"{path}.{_RUNNING[name]}" if path in layers and name in _RUNNING else key
    return names


def state_of(trace: Trace, prefix: str) -> dict[str, Tensor]:
    """Return every tensor whose key begins with a prefix, by the rest of its key."""
    return {name: trace.tensor(f"{prefix}{name}") for name in trace.names(prefix)}


def _measured(trace: Trace, prefix: str, estimates: Mapping[str, Estimate]) -> Iterator[Comparison]:
    """Compare what one client's second pass found."""
    for path, found in estimates.items():
        count = torch.tensor([found.count], dtype=torch.double)
        ours = {"running_num": count, "running_mean": found.mean, "running_var": found.var}
        for name, value in ours.items():
            yield Comparison(f"{prefix}{path}.{name}", value, trace.tensor(f"{prefix}{path}.{name}"))


def _sums_are_cleared(trace: Trace, prefix: str, paths: Sequence[str]) -> Iterator[Comparison]:
    """Compare what a merge leaves in the official sums, which ours does not send at all."""
    for path in paths:
        for name, value in (("num", FROZEN), ("mean", 0.0), ("var", 1.0)):
            recorded = trace.tensor(f"{prefix}{path}.running_{name}")
            yield Comparison(f"{prefix}{path}.running_{name}", torch.full_like(recorded, value), recorded, exact=True)


class _Merge:
    """The replay of one trace, round by round.

    Args:
        trace: The trace.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.net = Network(state_of(trace, "round0.global_in."))
        self.plan = norm_plan(self.net, RoleRule())
        self.clients = range(len(trace.setting("sizes")))
        self.own = {i: {f"{path}.distribution_factor": torch.zeros_like(layer.weight)
                        for path, layer in hybrid_layers(self.net).items()} for i in self.clients}  # fmt: skip

    def second_pass(self, state: Mapping[str, Tensor], prefix: str) -> Iterator[Comparison]:
        """Compare every client's second pass through a network, and keep what is pooled of them."""
        found = []
        for i in self.clients:
            self.net.take(state, self.own[i])
            found.append(measured(self.net, self.trace.tensor(f"client{i}.data")[:IMAGES]))
            yield from _measured(self.trace, prefix.format(i), found[-1])
        self.pooled = pooled_estimates(found)

    def round(self, number: int) -> Iterator[Comparison]:
        """Replay one round."""
        trace, head = self.trace, f"round{number}."
        state = state_of(trace, f"{head}global_in.")
        if number:
            for key, value in self.after.items():
                yield Comparison(f"{head}global_in.{key}", value, trace.tensor(f"{head}global_in.{key}"), exact=True)
        for i, own in self.own.items():
            for key, value in own.items():
                prefix = f"{head}client{i}.buffers.{key}"
                yield Comparison(prefix, value, trace.tensor(prefix), exact=True)
        yield from self.second_pass(state, head + "client{}.buffers.")
        yield from self.merge(state, head)
        yield from self.test(head)

    def merge(self, state: Mapping[str, Tensor], head: str) -> Iterator[Comparison]:
        """Compare the server's average of what is learned, and the moments of all clients that it moves."""
        names, average = _names(self.net), Average(self.plan)
        counters = {key: torch.zeros((), dtype=torch.long) for key in self.plan.by_key if key not in names}
        for i, weight in zip(self.clients, self.trace.setting("client_weights"), strict=True):
            trained = state_of(self.trace, f"{head}client{i}.trained.")
            average.add({ours: trained[theirs] for ours, theirs in names.items()} | counters, float(weight))
            self.own[i] = {key: trained[key] for key in self.own[i]}
            for path in self.pooled:
                for name in _RUNNING.values():  # training leaves the moments of all clients as they are
                    key = f"{head}client{i}.trained.{path}.{name}"
                    yield Comparison(key, state[f"{path}.{name}"], self.trace.tensor(key), exact=True)
        after, rate = average.result(), float(self.trace.setting("avg_momentum_round"))
        for path, moments in self.pooled.items():
            for name, new in zip(_RUNNING, moments, strict=True):
                after[f"{path}.{name}"] = state[f"{path}.{_RUNNING[name]}"].lerp(new, rate)
        for ours, theirs in names.items():
            yield Comparison(f"{head}global_out.{theirs}", after[ours], self.trace.tensor(f"{head}global_out.{theirs}"))
        yield from _sums_are_cleared(self.trace, f"{head}global_out.", list(self.pooled))
        self.after = state_of(self.trace, f"{head}global_out.")

    def test(self, head: str) -> Iterator[Comparison]:
        """Compare the second pass through the merged network, and the evaluation by what is pooled of it."""
        trace = self.trace
        yield from self.second_pass(self.after, head + "client{}.test_buffers.")
        self.net.take(self.after, {})
        for path, moments in self.pooled.items():
            for name, value in zip(_RUNNING, moments, strict=True):
                key = f"{head}test_global.{path}.{_RUNNING[name]}"
                yield Comparison(key, value, trace.tensor(key))
                getattr(self.net.get_submodule(path), name).copy_(value)
        yield from _sums_are_cleared(trace, f"{head}test_global.", list(self.pooled))
        with torch.no_grad():
            yield Comparison(
                f"{head}test_y", self.net.eval()(trace.tensor(f"{head}test_x")), trace.tensor(f"{head}test_y")
            )


def _replay_merge(trace: Trace) -> Iterator[Comparison]:
    merge, number = _Merge(trace), 0
    while trace.names(f"round{number}.global_in."):
        yield from merge.round(number)
        number += 1


FAMILIES = (
    Family(method="hybrid_bn", matches=_is_layer, replay=_replay_layer),
    Family(
        method="hybrid_bn (second pass and merge)",
        matches=_is_merge,
        replay=_replay_merge,
        note=lambda _: "local training is not replayed: the trace does not have its batches",
    ),
)
