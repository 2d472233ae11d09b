"""HBN's two passes through its own classes, against the official trace, and in whole federations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

import fednorm
from fednorm.errors import ConfigError, IncompleteError, RoleError
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.replies import EXTRA
from fednorm.federation.wire import pack, unpack
from fednorm.norms.hybrid_bn import HybridBNLayer, hybrid_layers
from fednorm.roles import Kind, Role
from fednorm.verify.golden_hybridbn import Network, state_of
from fednorm.verify.golden_trace import Trace, read_trace
from strategies.hbn import HBN, SAMPLES, Hybrid

TRACE = read_trace(Path(__file__).parents[1] / "golden" / "hybridbn_merge.npz")
LAYERS = ("hbn1", "hbn2")


def moments(prefix: str, name: str = "running") -> dict[str, Tensor]:
    """Return official moments under the names that travel."""
    return {f"{path}.running_{what}": TRACE.tensor(f"{prefix}{path}.{name}_{what}")
            for path in LAYERS for what in ("mean", "var")}  # fmt: skip


def found(prefix: str) -> dict[str, Tensor]:
    return {**moments(prefix), SAMPLES: TRACE.tensor(f"{prefix}hbn1.running_num")[0].float()}


class Client:
    """The clients of one round of the trace: they send what was recorded, and note what they were sent."""

    def __init__(self, number: int, lab: Any, *, silent: tuple[int, ...] = ()) -> None:
        self.sent: list[dict[str, Tensor]] = []
        self.app, head = ClientApp(), f"round{number}.client"

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            pid = int(context.node_config["partition-id"])
            state = unpack(message.content.array_records["arrays"])
            trained = state_of(TRACE, f"{head}{pid}.trained.")
            learned = {key: trained[key] for key in state if "running" not in key and key in trained}
            reply = lab.content(state | learned, TRACE.setting("client_weights")[pid])
            return Message(RecordDict({**reply, EXTRA: pack(found(f"{head}{pid}.buffers."))}), reply_to=message)

        @self.app.query("measure")
        def measure(message: Message, context: Context) -> Message:
            pid = int(context.node_config["partition-id"])
            if pid in silent:
                raise RuntimeError("gone")
            self.sent.append(unpack(message.content.array_records[EXTRA]))
            self.sent.append(unpack(message.content.array_records["arrays"]))
            return Message(RecordDict({EXTRA: pack(found(f"{head}{pid}.test_buffers."))}), reply_to=message)


def strategy_of(trace: Trace = TRACE) -> HBN:
    return HBN(Network(state_of(trace, "round0.global_in.")), global_momentum=trace.setting("avg_momentum_round"))


def test_two_rounds_are_those_of_the_official_server(lab: Any) -> None:
    """Weights averaged, (M, V) moved, and the moments of the second pass in what is evaluated."""
    strategy = strategy_of()
    state = state_of(TRACE, "round0.global_in.")
    tensors = {key: state[key] for key in strategy.plan.sent if key in state and "running" not in key}
    tensors |= {**moments("round0.global_in.", "global")}
    tensors |= {key: torch.zeros((), dtype=torch.long) for key in strategy.plan.counters}
    tensors = {key: tensors[key] for key in strategy.plan.sent}
    for number in range(2):
        strategy.nodes = ()
        clients = Client(number, lab)
        grid = InProcessGrid(clients.app, 3, {})
        messages = strategy.configure_train(number + 1, pack(tensors), ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(number + 1, grid.send_and_receive(messages))
        assert arrays is not None
        tensors, after = unpack(arrays), state_of(TRACE, f"round{number}.global_out.")
        for key, right in moments(f"round{number}.global_out.", "global").items():
            torch.testing.assert_close(strategy.extra_to_send()[key], right, rtol=1e-9, atol=1e-11)
        for key, right in moments(f"round{number}.test_global.", "global").items():
            torch.testing.assert_close(tensors[key], right, rtol=1e-9, atol=1e-11)
        for key in tensors:
            if "running" not in key and "batches" not in key:
                torch.testing.assert_close(tensors[key], after[key], rtol=1e-9, atol=1e-11)
        # The second pass is of the new weights, with the new (M, V).
        extra, weights = clients.sent[:2]
        assert torch.equal(extra["hbn2.running_var"], strategy.extra_to_send()["hbn2.running_var"])
        assert torch.equal(weights["conv1.weight"], tensors["conv1.weight"])
        assert len(clients.sent) == 6
        assert strategy.report.rejected == []


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("pid", [0, 1, 2])
def test_a_client_finds_what_the_official_client_found(number: int, pid: int) -> None:
    """Before training, of the weights that came; and its layers then hold (M, V) still."""
    network, head = Network(state_of(TRACE, "round0.global_in.")), f"round{number}."
    state = state_of(TRACE, f"{head}global_in.")
    own = {f"{p}.distribution_factor": TRACE.tensor(f"{head}client{pid}.buffers.{p}.distribution_factor")
           for p in LAYERS}  # fmt: skip
    network.take(state, own)
    images, tensors = TRACE.tensor(f"client{pid}.data"), network.state_dict()
    turn: Any = SimpleNamespace(
        model=network,
        extra={**moments(f"{head}global_in.", "global"), SAMPLES: torch.tensor(64.0)},
        write=lambda values: [tensors[key].copy_(value) for key, value in values.items()],
    )

    class Images:
        def __len__(self) -> int:
            return len(images)

        def inputs(self, rows: Tensor) -> tuple[Tensor, None]:
            return images[rows], None

    turn.client = SimpleNamespace(train=Images())
    with torch.no_grad():
        for layer in hybrid_layers(network).values():  # whatever was left there is overwritten
            layer.running_mean.fill_(7)
    local = Hybrid(strategy_of())
    with torch.no_grad():
        local.begin(turn)
    before = {key: tensor.clone() for key, tensor in tensors.items() if "running" in key}
    network.train()(images[:4]).square().sum().backward()
    assert all(torch.equal(tensors[key], value) for key, value in before.items())
    sent = local.end(turn)
    assert {layer.momentum for layer in hybrid_layers(network).values()} == {0.0}  # as they were in this network
    right = found(f"{head}client{pid}.buffers.")
    assert sent.keys() == right.keys()
    for key, value in right.items():
        torch.testing.assert_close(sent[key], value, rtol=1e-9, atol=1e-11)


def test_who_does_not_answer_in_the_second_pass_is_left_out_and_all_of_them_stop_the_round(lab: Any) -> None:
    for silent in ((1,), (0, 1, 2)):
        strategy = strategy_of()
        grid = InProcessGrid(Client(0, lab, silent=silent).app, 3, {})
        initial = strategy.initial_arrays(Network(state_of(TRACE, "round0.global_in.")))
        replies = grid.send_and_receive(strategy.configure_train(1, initial, ConfigRecord(), grid))
        if len(silent) == 3:
            with pytest.raises(IncompleteError, match=r"Round 1: none of the 3 clients answered in HBN's second pass"):
                strategy.aggregate_train(1, replies)
            continue
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        assert strategy.report.rejected == [(1, "the second pass failed: RuntimeError: gone")]
        n, parts = (12, 20), [found(f"round0.client{pid}.test_buffers.") for pid in (0, 2)]
        mean = sum(c * p["hbn1.running_mean"] for c, p in zip(n, parts, strict=True)) / 32
        torch.testing.assert_close(unpack(arrays)["hbn1.running_mean"], mean)


def test_the_share_stays_on_its_client_and_the_rest_is_sent() -> None:
    plan = strategy_of().plan
    assert plan.local == ("hbn1.distribution_factor", "hbn2.distribution_factor")
    assert {plan.by_key[key].kind for key in plan.keys(Role.SHARED)} == {
        Kind.WEIGHT, Kind.SCALE, Kind.SHIFT, Kind.MEAN, Kind.VAR, Kind.COUNT,
    }  # fmt: skip


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(RoleError, match=r"no layer of it\. Build it with --norm hybrid_bn"):
        HBN(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ConfigError, match=r"global_momentum, beta, is in \(0, 1\]; got 0"):
        HBN(nn.Sequential(HybridBNLayer(4, eps=1e-5, momentum=0.1)), global_momentum=0.0)
    with pytest.raises(ConfigError, match=r"do not fit HBN: moments/hbn1\.running_mean"):
        strategy_of().load_state_dict({})


SMALL: dict[str, Any] = {
    "data": {"train_per_client": 24, "test_per_domain": 16},
    "model": {"width": 4},
    "train": {"batch_size": 8, "learning_rate": 0.05},
}


def test_a_federation_evaluates_by_moments_of_the_present_weights(tmp_path: Path) -> None:
    result = fednorm.federated(strategy="hbn", rounds=2, seed=3, config=SMALL, runs=tmp_path)
    assert result["norm"]["name"] == "hybrid_bn"
    down, up = (result["rounds"][-1][f"bytes_{way}"] for way in ("down", "up"))
    assert down + up == result["plan"]["bytes_per_round"]
    assert result["rejected_updates"] == 0
    # (M, V) begin at 0 and 1 and a round moves them by 0.002; what is evaluated is not they.
    from safetensors.torch import load_file

    model = load_file(next(Path(result["run"]).glob("*model*.safetensors")))
    assert model["norm1.running_var"].sub(1).abs().max() > 0.05
