"""What lets a ClientApp that sends whole state dicts take part: it sees whole ones, and sends what travels alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import Tensor, nn

from fednorm.errors import AggregationError, RoleError
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.mods import describe, keep_local
from fednorm.rng import torch_seeded
from strategies.fedbn import FedBN

LOCAL = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def network() -> nn.Sequential:
    with torch_seeded(0):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


class Adding:
    """An app that adds its number, plus one, to every tensor it is given, and writes down what it was given."""

    def __init__(self, *, leaves_out: str = "") -> None:
        self.seen: dict[int, list[dict[str, Tensor]]] = {}
        self.sent: list[set[str]] = []
        self.app = ClientApp(mods=[self.spy, keep_local(FedBN(network()).plan, network())])
        self.app.query("describe")(describe)

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            number = int(context.node_config["partition-id"])
            state = message.content["weights"].to_torch_state_dict()
            self.seen.setdefault(number, []).append(state)
            new = {key: tensor + number + 1 for key, tensor in state.items() if key != leaves_out}
            metrics = MetricRecord({"num-examples": 1})
            return Message(RecordDict({"weights": ArrayRecord(new), "metrics": metrics}), reply_to=message)

    def spy(self, message: Message, context: Context, call_next: object) -> Message:
        """Stand outside of the mod, where the network is; call the record what this app calls it, and back."""
        if message.metadata.message_type != "train":
            return call_next(message, context)  # type: ignore[operator]
        rest = {name: record for name, record in message.content.items() if name != "arrays"}
        message.content = RecordDict({**rest, "weights": message.content["arrays"]})
        reply: Message = call_next(message, context)  # type: ignore[operator]
        self.sent.append(set(reply.content["weights"]))
        reply.content["arrays"] = reply.content.array_records.pop("weights")
        return reply


def run(adding: Adding, rounds: int) -> dict[str, Tensor]:
    server, model = ServerApp(), network()
    arrays: list[ArrayRecord] = []

    @server.main()
    def main(grid: object, _context: Context) -> None:
        strategy = FedBN(model, min_nodes=2)
        result = strategy.start(grid, strategy.initial_arrays(model), num_rounds=rounds, evaluate_every=10**9)
        arrays.append(result.arrays)

    grid = InProcessGrid(adding.app, 2, {})
    server(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    return arrays[0].to_torch_state_dict()


@pytest.fixture(autouse=True)
def _no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedBN, "configure_evaluate", lambda *_: [])
    monkeypatch.setattr(FedBN, "aggregate_evaluate", lambda *_: None)


def test_the_app_sees_whole_state_dicts_and_what_is_local_never_travels() -> None:
    adding, start = Adding(), network().state_dict()
    final = run(adding, rounds=2)
    assert all(sent == start.keys() - LOCAL for sent in adding.sent)
    for number in (0, 1):
        first, second = adding.seen[number]
        assert first.keys() == second.keys() == start.keys()
        for key in start:
            assert torch.equal(first[key], start[key])  # the model's initial tensors where nothing was sent
            added = number + 1 if key in LOCAL else 1.5  # its own; or the mean of what both sent
            torch.testing.assert_close(second[key], start[key] + (int(added) if "num" in key else added))
    for key in start.keys() - LOCAL:
        torch.testing.assert_close(final[key], start[key] + 3)


def test_a_reply_without_a_local_tensor_is_refused_by_name() -> None:
    with pytest.raises(AggregationError, match=r"1\.running_mean is missing. Reply with ArrayRecord\(model.state_dict"):
        run(Adding(leaves_out="1.running_mean"), rounds=1)


def test_nodes_say_which_client_they_are(logged: Any) -> None:
    run(Adding(), rounds=1)
    assert not any("does not describe itself" in message for message in logged.messages)


def test_its_error_is_a_role_error() -> None:
    mod = keep_local(FedBN(network()).plan, network())
    state = network().state_dict()
    message = Message(RecordDict({"a": ArrayRecord(state)}), dst_node_id=2, message_type="train.special")
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(RoleError, match=r"0\.weight"):
        mod(message, context, lambda *_: Message(RecordDict({"a": ArrayRecord({})}), reply_to=message))
