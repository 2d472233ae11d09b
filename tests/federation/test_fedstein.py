"""FedStein: the estimate, its risk, and rounds written in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.data.domain import pixels
from fednorm.errors import RoleError
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import STATE_RECORD
from fednorm.rng import torch_stream
from strategies.fedstein import FedStein, shrunk

RATE, ROUNDS = 0.05, 2
State = dict[str, Tensor]


def written(own: list[float], towards: list[float], variance: list[float]) -> list[float]:
    squares = sum((x - m) ** 2 / v for x, m, v in zip(own, towards, variance, strict=True))
    factor = max(0.0, 1 - (len(own) - 2) / squares)
    return [m + factor * (x - m) for x, m in zip(own, towards, strict=True)]


def test_the_estimate_is_the_formula() -> None:
    own, towards, variance = [1.0, -2.0, 0.5, 3.0], [0.5, -1.0, 0.0, 1.0], [0.5, 1.0, 2.0, 0.25]
    given = tuple(map(torch.tensor, (own, towards, variance)))
    assert shrunk(*given).tolist() == pytest.approx(written(own, towards, variance), rel=1e-6)
    assert written(own, towards, variance) != pytest.approx(own)
    near = [x + 0.01 for x in towards]  # no farther apart than chance: the others', whole
    assert shrunk(torch.tensor(near), given[1], given[2]).tolist() == pytest.approx(towards)
    assert torch.equal(shrunk(given[0][:2], given[1][:2], given[2][:2]), given[0][:2].double())  # two channels
    assert torch.equal(shrunk(given[0], given[0], given[2]), given[0].double())


def test_its_risk_is_below_that_of_what_was_measured() -> None:
    """James and Stein's theorem, at several distances between the truth and what is shrunk towards."""
    draw = torch.Generator().manual_seed(0)
    for distance in (0.0, 1.0, 3.0):
        truth = torch.full((16,), distance, dtype=torch.float64)
        variance, towards = torch.linspace(0.5, 2, 16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
        measured = truth + variance.sqrt() * torch.randn(2000, 16, dtype=torch.float64, generator=draw)
        estimates = torch.stack([shrunk(row, towards, variance) for row in measured])
        risk, own = (((x - truth).square() / variance).sum(1).mean() for x in (estimates, measured))
        assert risk < own
        assert own == pytest.approx(16, rel=0.05)


class Plain:
    """Three clients and a server of nothing but autograd and loops."""

    def __init__(self, site: Any) -> None:
        self.model: nn.Module = copy.deepcopy(site.bench.model)
        self.clients, self.counts = site.bench.federation.clients, (9, 8, 5)
        self.kept = site.strategy.plan.local
        self.server: State = self.state()
        self.own: list[State] = [{}, {}, {}]
        self.local: list[State] = [{key: self.server[key] for key in self.kept} for _ in self.clients]

    def state(self) -> State:
        return {key: tensor.clone() for key, tensor in self.model.state_dict().items()}

    def taken(self, pid: int) -> State:
        """Return what a client has before it trains or is evaluated."""
        state = {**self.server, **self.local[pid]}
        for i in range(1, 5) if self.own[pid] else ():
            n, var = self.counts[pid], self.server[f"norm{i}.running_var"].tolist()
            of_mean, of_var = [x / n for x in var], [2 * x * x / (n - 1) for x in var]
            for name, variance in (("mean", of_mean), ("var", of_var)):
                key = f"norm{i}.running_{name}"
                state[key] = torch.tensor(written(self.own[pid][key].tolist(), self.server[key].tolist(), variance))
        return state

    def trained(self, pid: int, r: int) -> State:
        self.model.load_state_dict(self.taken(pid))
        self.model.train()
        generator = torch_stream(1, "client", pid, "round", r, "batches")
        for rows in torch.randperm(self.counts[pid], generator=generator).split(4):
            if len(rows) > 1:
                images, labels = self.clients[pid].train.batch(rows)
                loss = functional.cross_entropy(self.model(pixels(images)), labels)
                gradients = torch.autograd.grad(loss, list(self.model.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                        parameter -= RATE * gradient
        return self.state()

    def round(self, r: int) -> None:
        states = [self.trained(pid, r) for pid in range(3)]
        self.own = [{key: tensor for key, tensor in state.items() if "running" in key} for state in states]
        self.local = [{key: state[key] for key in self.kept} for state in states]
        for key, tensor in self.server.items():
            if tensor.is_floating_point():
                self.server[key] = sum(n * s[key] for n, s in zip(self.counts, states, strict=True)) / 22

    def loss(self, pid: int) -> float:
        self.model.load_state_dict(self.taken(pid))
        self.model.eval()
        images, labels = self.clients[pid].test.batch(torch.arange(len(self.clients[pid].test)))
        return functional.cross_entropy(self.model(pixels(images)), labels).item()

    def shares(self) -> list[float]:
        """Return how much of its own moments each client keeps, layer by layer."""
        far = [(self.taken(p)[k] - self.server[k]).norm() / (t - self.server[k]).norm()
               for p in range(3) for k, t in self.own[p].items()]  # fmt: skip
        return [float(share) for share in far]


def test_the_rounds_are_those_written_out(make_site: Any) -> None:
    site = make_site("fedstein", model={"name": "mlp", "width": 8}, norm={"name": "batch_norm", "momentum": 0.7})
    initial = site.strategy.initial_arrays(site.bench.model)
    assert set(site.strategy.plan.local) == {f"norm{i}.{name}" for i in range(1, 5) for name in ("weight", "bias")}
    plain = Plain(site)
    for r in range(1, ROUNDS + 1):
        plain.round(r)
    result = site.strategy.start(site.grid, initial, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    for key, tensor in unpack(result.arrays).items():
        if "batches" not in key:
            torch.testing.assert_close(tensor, plain.server[key], rtol=1e-4, atol=1e-5)
    for pid, report in enumerate(site.strategy.report.evaluate):
        kept = unpack(site.grid.contexts[pid + 2].state.array_records[STATE_RECORD])
        for key, tensor in kept.items():
            torch.testing.assert_close(tensor, plain.own[pid][key], rtol=1e-4, atol=1e-5)
        assert report.metrics["loss"] == pytest.approx(plain.loss(pid), rel=1e-3)
    shares = plain.shares()
    assert any(0.05 < share < 0.95 for share in shares), shares  # between averaged and local


def test_a_network_without_moments_is_refused() -> None:
    with pytest.raises(RoleError, match=r"shares none\. Build it with a norm"):
        FedStein(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
