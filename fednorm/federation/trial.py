"""One round of a strategy with two clients that train one step each: does it work on a model at all?"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fednorm.federation.flower_private import quiet_flower_log
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.replies import EXTRA
from fednorm.federation.strategy import NormStrategy
from fednorm.federation.wire import pack, unpack

CLIENTS = 2


def one_round(strategy: NormStrategy, model: nn.Module, step: Callable[[nn.Module], float]) -> float:
    """Run one round through Flower's messages.

    Args:
        strategy: Made for the model.
        model: The server's model; it is not changed.
        step: Trains a model for one step and returns its loss.

    Returns:
        The clients' mean loss.

    Raises:
        AggregationError: No client could train or be averaged; the message has its reason.
    """
    app = ClientApp()
    losses = []

    @app.train()
    def train(message: Message, _: Context) -> Message:
        client = copy.deepcopy(model).train()
        client.load_state_dict(unpack(message.content.array_records["arrays"]), strict=False)
        losses.append(step(client))
        state = client.state_dict()
        arrays = pack({key: state[key].clone() for key in strategy.plan.sent})
        metrics = MetricRecord({"num-examples": 2, "loss": losses[-1], "accuracy": 0.0})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        if forms := strategy.extra_expected():
            zeros = {k: torch.zeros(f.shape, dtype=getattr(torch, f.dtype)) for k, f in forms.items()}
            content[EXTRA] = pack(zeros)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        metrics = MetricRecord({"num-examples": 2, "loss": losses[-1], "accuracy": 0.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    with quiet_flower_log():  # what a run says of its rounds and nodes is of no use here
        result = strategy.start(InProcessGrid(app, CLIENTS, {}), strategy.initial_arrays(model), num_rounds=1)
    with torch.no_grad():
        copy.deepcopy(model).load_state_dict(unpack(result.arrays), strict=False)
    return sum(losses) / len(losses)
