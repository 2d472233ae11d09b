"""GReg against its rounds written in plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import NORMS
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.wire import unpack
from fednorm.rng import torch_stream
from fednorm.roles import Kind
from strategies.greg import GReg, symmetric_kl

RATE, ROUNDS, LAMBDA = 0.05, 3, 0.7
State = dict[str, Tensor]
RUNNING = sorted(
    card.name
    for card in NORMS
    if {Kind.MEAN, Kind.VAR} & {t.kind for t in card.tensors.values()}
    if card.name not in ("instance_norm", "affine_scaled_attention")  # none here: an option, and of attention
)


def trained(model: nn.Module, server: State, client: Any, pid: int, r: int) -> State:
    """Return a client's tensors; a second network, with the same weights, has the server's statistics."""
    model.load_state_dict(server)
    model.train()
    generator = torch_stream(1, "client", pid, "round", r, "batches")
    for rows in torch.randperm(len(client.train), generator=generator).split(4):
        if len(rows) == 1:
            continue
        images, labels = client.train.batch(rows)
        logits = model(pixels(images))
        loss = functional.cross_entropy(logits, labels)
        if r > 1:
            other = copy.deepcopy(model).eval()
            for i in range(1, 5):
                for name in ("running_mean", "running_var"):
                    getattr(other.get_submodule(f"norm{i}"), name).copy_(server[f"norm{i}.{name}"])
            # The twin's gradients are those of the same weights: added by hand.
            p, q = logits.softmax(1), other(pixels(images)).softmax(1)
            divergence = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean() / 2
            loss = loss + LAMBDA * divergence
            twin = torch.autograd.grad(loss, list(other.parameters()), retain_graph=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for place, (parameter, gradient) in enumerate(zip(model.parameters(), gradients, strict=True)):
                parameter -= RATE * (gradient + (twin[place] if r > 1 else 0))
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.few(1)
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_the_rounds_are_those_written_out(beta: float, make_site: Any) -> None:
    options = {"lambd": LAMBDA, "global_momentum": beta}
    site = make_site("greg", options=options, model={"name": "mlp", "width": 8})
    initial = site.strategy.initial_arrays(site.bench.model)
    model, clients = copy.deepcopy(site.bench.model), site.bench.federation.clients
    server = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for r in range(1, ROUNDS + 1):
        states = [trained(model, server, client, pid, r) for pid, client in enumerate(clients)]
        for key, old in server.items():
            mean = sum(len(c.train) * s[key] for c, s in zip(clients, states, strict=True)) / 22
            weight = beta if "running" in key and r > 1 else 1.0
            server[key] = (1 - weight) * old + weight * mean if old.is_floating_point() else old
    result = site.strategy.start(site.grid, initial, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    for key, tensor in unpack(result.arrays).items():
        if "batches" not in key:
            torch.testing.assert_close(tensor, server[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert not site.bench.model._forward_pre_hooks
    fedavg = make_site("greg", options={"lambd": 0.0}, model={"name": "mlp", "width": 8})
    other = fedavg.strategy.start(fedavg.grid, initial, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    assert not torch.equal(unpack(other.arrays)["fc1.weight"], unpack(result.arrays)["fc1.weight"])


def test_without_the_term_it_is_fedavg_to_the_last_bit(make_site: Any) -> None:
    results = []
    for name, options in (("greg", {"lambd": 0.0}), ("fedavg", {})):
        site = make_site(name, options=options)
        arrays = site.strategy.initial_arrays(site.bench.model)
        results.append(unpack(site.strategy.start(site.grid, arrays, num_rounds=2, evaluate_every=2).arrays))
    assert all(torch.equal(results[0][key], tensor) for key, tensor in results[1].items())


def test_the_divergence_of_equal_answers_is_zero_and_it_is_symmetric() -> None:
    a, b = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    assert symmetric_kl(a, a + 3) < 1e-6
    assert symmetric_kl(a, b) == pytest.approx(float(symmetric_kl(b, a)))
    p, q = a.double().softmax(1), b.double().softmax(1)
    right = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean() / 2
    assert float(symmetric_kl(a, b)) == pytest.approx(float(right), rel=1e-5)


@pytest.mark.parametrize("name", RUNNING)
def test_the_second_pass_moves_no_statistics_of_any_norm(name: str, make_site: Any) -> None:
    """One batch: the statistics that it leaves do not depend on the term, and the weights do."""
    sent = []
    for lambd in (0.0, 1.0):
        site = make_site("greg", norm={"name": name}, options={"lambd": lambd}, train={"local_steps": 1})
        arrays = site.strategy.initial_arrays(site.bench.model)
        sent.append((site.train(1, 2, arrays), site.strategy.statistics))
    (without, keys), (with_term, _) = sent
    assert all(torch.equal(without[key], with_term[key]) for key in keys)
    assert not torch.equal(without["conv1.weight"], with_term["conv1.weight"])


def test_what_it_cannot_do_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for options in ({"lambd": -1.0}, {"global_momentum": 0.0}):
        with pytest.raises(ConfigError, match="lambda, must be 0 or more"):
            GReg(network, **options)
    with pytest.raises(RoleError, match=r"shares no running statistics\. Build"):
        GReg(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
