"""Replay of one communication step of FedBN's code: what the server and its clients hold before and after it.

The official code keeps an entry local where ``bn`` is in its *name*; ours where its layer is a normalization layer.
Entries about which the two disagree are not compared, and the outcome names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from fednorm.cards import STRATEGIES
from fednorm.errors import DataError
from fednorm.federation.aggregation import Average
from fednorm.federation.plan import NormPlan
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.workbench import received
from fednorm.roles import Role
from fednorm.verify.golden_trace import Comparison, Family, Trace

State = Mapping[str, Tensor]


def _matches(trace: Trace) -> bool:
    return {"mode", "clients", "client_weights"} <= trace.hparams.keys() and all(
        trace.names(f"{when}.{who}.") for when in ("in", "out") for who in ("server", "client0")
    )


def _state(trace: Trace, prefix: str) -> dict[str, Tensor]:
    state = {name: trace.tensor(prefix + name) for name in trace.names(prefix)}
    if not state:
        raise DataError(f"the trace has no array {prefix + '*'!r}")
    return state


def _leaf(path: str, tensors: State) -> nn.Module:
    """Return the layer that owns the tensors, known by their names and axes."""
    weight = tensors.get("weight")
    if "running_mean" in tensors:
        return nn.BatchNorm2d(len(tensors["running_mean"]), affine=weight is not None)
    if weight is not None and weight.ndim == 4:
        return nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), bias="bias" in tensors)
    if weight is not None and weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
    raise DataError(f"cannot tell which layer owns {', '.join(f'{path}.{name}' for name in tensors)}")


def _module(state: State) -> nn.Module:
    """Return a network with this state dict; it has no forward pass."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        layers.setdefault(path, {})[name] = tensor
    root = nn.Module()
    for path, tensors in layers.items():
        parent, *ancestors = root, *path.split(".")[:-1]
        for name in ancestors:
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(path.rpartition(".")[2], _leaf(path, tensors))
    root.load_state_dict(dict(state))
    return root


def _strategy(trace: Trace) -> NormStrategy:
    return STRATEGIES[str(trace.setting("mode"))].make(_module(_state(trace, "in.server.")), weighting="equal")


def _disputed(plan: NormPlan) -> list[str]:
    """Return the keys about which the layer's type and the name rule disagree."""
    if not plan.local:
        return []
    return [key for key, entry in plan.by_key.items() if (entry.role is Role.LOCAL) != ("bn" in key)]


def _replay(trace: Trace) -> Iterator[Comparison]:
    strategy = _strategy(trace)
    plan = strategy.plan
    before = _state(trace, "in.server.")
    clients = {f"client{i}": _state(trace, f"in.client{i}.") for i in range(int(trace.setting("clients")))}
    weights = list(trace.setting("client_weights"))
    if len(weights) != len(clients):
        raise DataError(f"{len(clients)} clients have {len(weights)} client_weights")
    average = Average(plan)
    for tensors, weight in zip(clients.values(), weights, strict=True):
        average.add(tensors, float(weight))
    sent = strategy.server_update({key: before[key] for key in plan.sent}, average.result())
    after = {"server": received(plan, sent, {}, before)}
    for name, tensors in clients.items():
        own = {key: tensors[key] for key in (*plan.local, *plan.counters)}
        after[name] = received(plan, sent, own, before)
    compared = [key for key in plan.by_key if key not in _disputed(plan)]
    for name, tensors in after.items():
        for key in compared:
            averaged = key in plan.sent and tensors[key].is_floating_point()
            recorded = trace.tensor(f"out.{name}.{key}")
            yield Comparison(f"out.{name}.{key}", tensors[key], recorded, exact=not averaged)


def _note(trace: Trace) -> str:
    layers = dict.fromkeys(key.rpartition(".")[0] + ".*" for key in _disputed(_strategy(trace).plan))
    if not layers:
        return ""
    return f"not compared, as the official rule goes by names and ours by types: {', '.join(layers)}"


FAMILIES = (
    Family(
        method="one round of communication (FedBN)", matches=_matches, replay=_replay, rtol=1e-6, atol=1e-6, note=_note
    ),
)
