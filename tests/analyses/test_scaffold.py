"""The rules for buffers that the analysis of SCAFFOLD compares, each by its formula; and what follows from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.analyses import Setup, scaffold
from fednorm.analyses.scaffold import Ruled, Watched
from fednorm.config import merge, resolve
from fednorm.federation.simulate import simulate
from fednorm.federation.workbench import Workbench
from fednorm.models import make_model
from fednorm.norms import make_norm

SMALL: dict[str, Any] = {
    "kind": "federated",
    "model": {"name": "cnn", "width": 4},
    "data": {"train_per_client": 16, "test_per_domain": 8, "image_size": 8, "domains": ["scans", "photo", "street"]},
    "train": {"batch_size": 8, "learning_rate": 0.05},
    "rounds": {"num_rounds": 3},
    "engine": "client",
    "workers": 1,
}


def model() -> nn.Module:
    return make_model("cnn", make_norm("batch_norm"), num_classes=4, image_size=8, width=4, seed=1)


def sent_tensors(strategy: dict[str, Any], **more: Any) -> tuple[dict[str, Tensor], Any]:
    """The server's tensors that the last round began with, and the strategy."""
    bench = Workbench(resolve(merge(SMALL, {"strategy": strategy}, more)))
    simulate(bench.config, runs=None, bench=bench)
    return dict(bench.strategy._sent), bench.strategy


def test_averaged_is_the_strategy_scaffold_to_the_bit() -> None:
    ruled, _ = sent_tensors(scaffold.RULED["strategy"])
    plain, _ = sent_tensors({"name": "scaffold"})
    assert ruled.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in ruled.items())


def test_controlled_buffers_are_the_averaged_ones_where_all_take_part() -> None:
    """The corrections c - c_i of all clients sum to 0, and training does not read running statistics."""
    averaged, _ = sent_tensors(scaffold.RULED["strategy"], rounds={"weighting": "equal"})
    together, strategy = sent_tensors(
        {**scaffold.RULED["strategy"], "buffers": "controlled"}, rounds={"weighting": "equal"}
    )
    assert strategy.controlled
    for key, tensor in together.items():
        torch.testing.assert_close(tensor, averaged[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("buffers", "far"), [("averaged", 1.0), ("stepped", 2.5), ("controlled", 2.5)])
def test_a_server_step_beyond_the_average_may_leave_a_variance_negative(buffers: str, far: float) -> None:
    strategy = Ruled(model(), buffers=buffers, server_learning_rate=2.5)
    old = {key: torch.ones_like(tensor) for key, tensor in model().state_dict().items() if key in strategy.plan.sent}
    mean = {key: torch.full_like(tensor, 0.5 if tensor.is_floating_point() else 7) for key, tensor in old.items()}
    strategy._weights, strategy._changes = [1.0], {key: torch.zeros_like(c) for key, c in strategy._control.items()}
    new = strategy.server_update(old, mean)
    assert torch.equal(new["conv1.weight"], torch.full_like(old["conv1.weight"], 1 + 2.5 * (0.5 - 1)))
    assert torch.equal(new["norm1.running_var"], torch.full_like(old["norm1.running_var"], 1 + far * (0.5 - 1)))
    assert (new["norm1.running_var"].min() < 0) == (far > 2)
    assert int(new["norm1.num_batches_tracked"]) == 7


def test_controlled_buffers_move_as_if_they_were_trained() -> None:
    """y <- y - eta (c - c_i) after each step; c_i+ = c_i - c + (x - y) / (K eta), of weights and buffers alike."""
    strategy = Ruled(model(), buffers="controlled")
    generator = torch.Generator().manual_seed(2)
    drawn = {key: torch.rand(tensor.shape, generator=generator) for key, tensor in strategy._control.items()}
    network, rate, steps = model().train(), 0.1, 3
    shared = {key: p for key, p in network.named_parameters() if key in strategy._control}
    own = {key: 0.3 * tensor for key, tensor in drawn.items()}
    turn: Any = SimpleNamespace(
        tensors=network.state_dict(), shared=shared, extra=drawn, state=dict(own), plan=strategy.plan,
        rate=rate, steps=steps, server_round=1,
    )  # fmt: skip
    first = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    expected = {key: first[key].clone() for key in strategy.controlled}
    local = Watched(strategy)
    local.begin(turn)
    for _ in range(steps):
        before = {key: turn.tensors[key].clone() for key in strategy.controlled}
        network(torch.randn(4, 3, 8, 8, generator=generator)).square().sum().backward()
        for key in expected:  # what the layer's own average makes of it, then the correction
            expected[key] += turn.tensors[key] - before[key] - rate * (drawn[key] - own[key])
        gradients = {key: parameter.grad.clone() for key, parameter in shared.items() if parameter.grad is not None}
        local.adjust(turn)
        for key, gradient in gradients.items():
            torch.testing.assert_close(shared[key].grad, gradient + drawn[key] - own[key])
        network.zero_grad()
    sent = local.end(turn)
    for key in expected:
        torch.testing.assert_close(turn.tensors[key], expected[key])
        new = own[key] - drawn[key] + (first[key] - turn.tensors[key]) / (steps * rate)
        torch.testing.assert_close(turn.state[key], new)
        torch.testing.assert_close(sent[key], new - own[key])
    assert sent.keys() == drawn.keys()


def test_adam_makes_control_variates_of_size_one() -> None:
    """After one step of Adam c_i is the sign of its gradient, whatever its size: of three clients 3 c is +-1 or +-3."""
    train = {"optimizer": "adam", "learning_rate": 0.001, "batch_size": 16}
    _, strategy = sent_tensors(scaffold.RULED["strategy"], train=train, rounds={"num_rounds": 1})
    sums = torch.cat([3 * c.flatten().abs() for key, c in strategy._control.items() if "conv" in key])
    signs = (sums - 1).abs().minimum((sums - 3).abs()) < 0.01
    assert float(signs.double().mean()) > 0.95


def test_the_rows_are_named_once() -> None:
    names = [row.name for row in scaffold.rows(Setup(), 2)]
    assert len(set(names)) == len(names)
    assert {"averaged, adam", "stepped, eta_g 2", "controlled, 2 of 5 clients"} <= set(names)
