"""FedAvg against Flower's own, and its pooled moments against those of the clients' data together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn

from fednorm.errors import ConfigError
from fednorm.federation.wire import pack, unpack
from fednorm.roles import Role
from strategies.fedavg import FedAvg


def test_the_average_of_floats_is_flowers(lab: Any) -> None:
    strategy = lab.make("fedavg")
    updates = {pid: (lab.update(strategy, pid), 7 + 100 * pid) for pid in range(4)}
    floats = [key for key in strategy.plan.sent if updates[0][0][key].is_floating_point()]
    assert len(floats) == len(strategy.plan.sent) - 1
    grid = lab.answers(updates)
    replies = list(grid.send_and_receive(strategy.configure_train(1, pack(updates[0][0]), ConfigRecord(), grid)))
    ours, our_metrics = strategy.aggregate_train(1, replies)
    theirs, their_metrics = FlowerFedAvg().aggregate_train(1, replies)
    assert ours is not None
    assert theirs is not None
    for key in floats:
        a, b = unpack(ours)[key], torch.from_numpy(theirs[key].numpy())
        scale = max(update[key].abs().max().item() for update, _ in updates.values())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=1e-6 * scale)
    assert our_metrics is not None
    assert their_metrics is not None
    assert our_metrics["loss"] == pytest.approx(their_metrics["loss"])
    # Flower's trap that ours closes: a counter becomes a fraction
    assert theirs["1.num_batches_tracked"].numpy().dtype.kind == "f"


def test_pooled_moments_are_those_of_all_clients_data_together(lab: Any) -> None:
    torch.manual_seed(0)
    data = [torch.randn(n, 5) * scale + shift for n, scale, shift in ((10, 1, 0), (30, 3, 4), (60, 0.1, -7))]
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    strategy = FedAvg(model, moments="pool")
    assert strategy.plan.keys(Role.POOLED) == ("1.running_mean", "1.running_var")
    initial = unpack(strategy.initial_arrays(model))
    updates = {
        pid: (initial | {"1.running_mean": x.mean(0), "1.running_var": x.var(0, unbiased=False)}, len(x))
        for pid, x in enumerate(data)
    }
    new = lab.round(strategy, initial, lab.answers(updates))
    together = torch.cat(data).double()
    torch.testing.assert_close(new["1.running_mean"], together.mean(0).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new["1.running_var"], together.var(0, unbiased=False).float(), rtol=1e-6, atol=1e-6)
    published = lab.round(FedAvg(model), initial, lab.answers(updates))
    assert (published["1.running_var"] < new["1.running_var"]).all()
    for key in ("0.weight", "1.weight", "1.num_batches_tracked"):
        assert torch.equal(published[key], new[key])


def test_the_one_zero_four_example(lab: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    initial = unpack(FedAvg(model).initial_arrays(model))
    updates = {pid: (initial | {"0.running_mean": torch.tensor([m])}, 1) for pid, m in enumerate((0.0, 4.0))}
    variances = {
        how: lab.round(FedAvg(model, moments=how), initial, lab.answers(updates))["0.running_var"].item()
        for how in ("average", "pool")
    }
    assert variances == {"average": 1.0, "pool": 5.0}


def test_moments_is_one_of_two_words(lab: Any) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.moments.*'pol'.*Did you mean 'pool'"):
        lab.make("fedavg", moments="pol")
