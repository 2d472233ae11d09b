"""FBN against its rounds written in plain PyTorch; hybrid normalization under FedBN."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.wire import unpack
from fednorm.norms import make_norm
from fednorm.norms.hybrid_bn import Held, hybrid_layers
from fednorm.rng import torch_stream
from strategies.fbn import FBN

RATE, ROUNDS = 0.05, 2
State = dict[str, Tensor]


def forward(w: State, x: Tensor, own: dict[str, list[Tensor]]) -> Tensor:
    """Return the logits of an MLP normalized by (M, V) of ``w``; the batch's moments are added to ``own``."""
    h = x.flatten(1)
    for i in range(1, 5):
        h = h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"]
        for name, batch in (("mean", h.mean(0)), ("var", h.var(0, correction=0))):
            own.setdefault(f"norm{i}.running_{name}", []).append(batch.detach())
        scaled = (h - w[f"norm{i}.running_mean"]) / (w[f"norm{i}.running_var"] + 1e-5).sqrt()
        h = (scaled * w[f"norm{i}.weight"] + w[f"norm{i}.bias"]).relu()
    return h @ w["fc5.weight"].T + w["fc5.bias"]


def turn(server: State, client: Any, pid: int, r: int) -> State:
    w = {key: tensor.clone() for key, tensor in server.items()}
    own: dict[str, list[Tensor]] = {}
    learned = [key for key in w if "running" not in key and "batches" not in key and "factor" not in key]
    generator = torch_stream(1, "client", pid, "round", r, "batches")
    for rows in torch.randperm(len(client.train), generator=generator).split(4):
        if len(rows) > 1:
            images, labels = client.train.batch(rows)
            for key in learned:
                w[key].requires_grad_()
            loss = functional.cross_entropy(forward(w, pixels(images).double(), own), labels)
            gradients = torch.autograd.grad(loss, [w[key] for key in learned])
            for key, gradient in zip(learned, gradients, strict=True):
                w[key] = (w[key] - RATE * gradient).detach()
    return w | {key: sum(of_batches) / len(of_batches) for key, of_batches in own.items()}


@pytest.mark.parametrize("beta", [0.1, 0.4])
def test_the_rounds_are_those_written_out(beta: float, make_site: Any) -> None:
    site = make_site("fbn", options={"global_momentum": beta}, model={"name": "mlp", "width": 8})
    initial = site.strategy.initial_arrays(site.bench.model)
    server = {k: t.double() if t.is_floating_point() else t for k, t in site.bench.model.state_dict().items()}
    server = copy.deepcopy(server)
    clients = site.bench.federation.clients
    p = [len(client.train) / 22 for client in clients]
    for r in range(1, ROUNDS + 1):
        states = [turn(server, client, pid, r) for pid, client in enumerate(clients)]
        mean = {key: sum(w * s[key] for w, s in zip(p, states, strict=True)) for key in server}
        for i in range(1, 5):
            key, var = f"norm{i}.running_mean", f"norm{i}.running_var"
            mean[key] = (1 - beta) * server[key] + beta * mean[key]
            terms = [len(c.train) * (s[var] + (s[key] - mean[key]) ** 2) for c, s in zip(clients, states, strict=True)]
            mean[var] = (1 - beta) * server[var] + beta * sum(terms) / 22
        server = mean
    result = site.strategy.start(site.grid, initial, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    ours = unpack(result.arrays)
    assert ours.keys() == server.keys()  # nothing stays on a client
    for key, tensor in ours.items():
        if "batches" not in key:
            torch.testing.assert_close(tensor.double(), server[key], rtol=1e-4, atol=1e-5)
    assert all(not tensor.any() for key, tensor in ours.items() if "factor" in key)
    assert all(layer.held is None for layer in hybrid_layers(site.bench.model).values())


def test_a_layer_that_holds_moments_is_batch_norm_in_evaluation() -> None:
    layer, other = make_norm("hybrid_bn").layer(4, 2).double(), nn.BatchNorm2d(4).double().eval()
    mean, var = torch.randn(4).double(), torch.rand(4).double() + 0.5
    layer.held = Held(mean, var)
    other.running_mean, other.running_var = mean.clone(), var.clone()
    x = torch.randn(3, 4, 2, 2).double()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, right = layer(one), other(two)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    right.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-10, atol=1e-12)
    assert layer.distribution_factor.grad is None
    more = torch.randn(2, 4, 3, 1).double()
    layer(more)
    for running, of in ((layer.running_mean, torch.mean), (layer.running_var, lambda t, d: t.var(d, correction=0))):
        torch.testing.assert_close(running, (of(x, (0, 2, 3)) + of(more, (0, 2, 3))) / 2)
    assert torch.equal(layer.held.mean, mean)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(RoleError, match=r"Build it with --norm hybrid_bn"):
        FBN(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ConfigError, match="global_momentum"):
        FBN(nn.Sequential(make_norm("hybrid_bn").layer(4, 2)), global_momentum=0)


def test_under_fedbn_every_tensor_of_hybrid_layers_stays_on_its_client(make_site: Any) -> None:
    """And the running moments of each are those of its own batches, mixed by a share of its own."""
    site = make_site("fedbn", norm={"name": "hybrid_bn"})
    entries = site.strategy.plan.entries
    assert set(site.strategy.plan.local) == {e.key for e in entries if e.key.startswith("norm")}
    assert "norm1.distribution_factor" in site.strategy.plan.local
    arrays = site.strategy.initial_arrays(site.bench.model)
    result = site.strategy.start(site.grid, arrays, num_rounds=2, evaluate_every=2)
    assert not any(key.startswith("norm") for key in unpack(result.arrays))
    one, other = site.kept(0), site.kept(1)
    for name in ("distribution_factor", "running_mean", "running_var", "weight"):
        assert not torch.equal(one[f"norm1.{name}"], other[f"norm1.{name}"])
    assert site.strategy.report.rejected == []
