"""BN-SCAFFOLD against its rounds written in plain PyTorch, and what its corrected moments are."""

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
from fednorm.norms import make_norm
from fednorm.rng import torch_stream
from strategies.bn_scaffold import BNScaffold, Corrected

RATE, ROUNDS = 0.02, 3
LAYERS = range(1, 5)
State = dict[str, Tensor]
Moments = dict[int, tuple[Tensor, Tensor]]


def forward(w: State, x: Tensor, shift: Moments, seen: dict[int, list[tuple[Tensor, Tensor]]]) -> Tensor:
    """Return the logits of an MLP whose norms are corrected by ``shift``; each batch's moments go to ``seen``."""
    h = x.flatten(1)
    for i in LAYERS:
        h = h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"]
        mean, square = h.mean(0), (h * h).mean(0)
        seen.setdefault(i, []).append((mean.detach(), square.detach()))
        m, q = mean + shift[i][0], square + shift[i][1]
        h = (h - m) / ((q - m * m).clamp(min=0) + 1e-5).sqrt() * w[f"norm{i}.weight"] + w[f"norm{i}.bias"]
        h = h.relu()
    return h @ w["fc5.weight"].T + w["fc5.bias"]


class Plain:
    """Three clients and a server, in double precision."""

    def __init__(self, site: Any) -> None:
        state = site.bench.model.state_dict()
        self.clients = site.bench.federation.clients
        self.keys = [key for key, _ in site.bench.model.named_parameters()]
        self.x: State = {key: state[key].double() for key in self.keys}
        zeros = {key: torch.zeros_like(t) for key, t in self.x.items()}
        nothing = {i: (torch.zeros(()).double(),) * 2 for i in LAYERS}
        self.c, self.own = zeros, [zeros] * 3
        self.bar: Moments = dict(nothing)
        self.mine: list[Moments] = [{}, {}, {}]

    def turn(self, pid: int, r: int) -> tuple[State, State, Moments]:
        client, w, steps = self.clients[pid], dict(self.x), 0
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        zero = torch.zeros(()).double()
        mine = self.mine[pid]
        shift = {i: tuple(b - o for b, o in zip(self.bar[i], mine[i], strict=True)) if mine else (zero, zero)
                 for i in LAYERS}  # fmt: skip
        generator = torch_stream(1, "client", pid, "round", r, "batches")
        for rows in torch.randperm(len(client.train), generator=generator).split(4):
            if len(rows) > 1:
                images, labels = client.train.batch(rows)
                w = {key: tensor.detach().requires_grad_() for key, tensor in w.items()}
                loss = functional.cross_entropy(forward(w, pixels(images).double(), shift, seen), labels)
                gradients = torch.autograd.grad(loss, [w[key] for key in self.keys])
                w = {k: w[k].detach() - RATE * (g + self.c[k] - self.own[pid][k])
                     for k, g in zip(self.keys, gradients, strict=True)}  # fmt: skip
                steps += 1
        own = {k: self.own[pid][k] - self.c[k] + (self.x[k] - w[k]) / (steps * RATE) for k in self.keys}
        moments = {i: tuple(sum(v) / steps for v in zip(*seen[i], strict=True)) for i in LAYERS}
        return w, own, moments

    def round(self, r: int) -> None:
        turns = [self.turn(pid, r) for pid in range(3)]
        p = [len(client.train) / 22 for client in self.clients]
        self.x = {k: sum(n * t[0][k] for n, t in zip(p, turns, strict=True)) for k in self.keys}
        self.own = [t[1] for t in turns]
        self.mine = [t[2] for t in turns]
        self.c = {k: sum(n * own[k] for n, own in zip(p, self.own, strict=True)) for k in self.keys}
        self.bar = {i: tuple(sum(n * m[i][j] for n, m in zip(p, self.mine, strict=True)) for j in (0, 1))
                    for i in LAYERS}  # fmt: skip


def test_the_rounds_are_those_written_out(make_site: Any) -> None:
    train = {"learning_rate": RATE}
    site, scaffold = (make_site(n, model={"name": "mlp", "width": 8}, train=train) for n in ("bn_scaffold", "scaffold"))
    plain = Plain(site)
    arrays = site.strategy.initial_arrays(site.bench.model)
    for r in range(1, ROUNDS + 1):
        plain.round(r)
    result = site.strategy.start(site.grid, arrays, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    ours = unpack(result.arrays)
    assert site.strategy.report.rejected == []
    for key, right in plain.x.items():
        torch.testing.assert_close(ours[key].double(), right, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    sent = site.strategy.extra_to_send()
    for i in LAYERS:
        for name, right in zip(("running_mean", "running_var"), plain.bar[i], strict=True):
            torch.testing.assert_close(sent[f"norm{i}.{name}"].double(), right, rtol=1e-3, atol=1e-3)
    kept = unpack(site.grid.contexts[3].state.array_records[STATE_RECORD])
    torch.testing.assert_close(kept["norm2.running_mean"].double(), plain.mine[1][2][0], rtol=1e-3, atol=1e-3)
    assert all("forward" not in vars(layer) for layer in site.bench.model.modules())
    other = scaffold.strategy.start(scaffold.grid, arrays, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    assert not torch.allclose(unpack(other.arrays)["fc1.weight"], ours["fc1.weight"], atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (3, 4, 2, 2)])
def test_without_a_correction_it_is_batch_norm(shape: tuple[int, ...]) -> None:
    layer: Any = make_norm("batch_norm").layer(4, len(shape) - 2)
    twin, x = copy.deepcopy(layer), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(4)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, right = Corrected(layer, zeros, zeros)(one), twin(two)
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    y.square().mean().backward()
    right.square().mean().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    for key, tensor in layer.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[key])
    layer.eval()
    torch.testing.assert_close(Corrected(layer, zeros + 1, zeros)(x), twin.eval()(x))


def test_whole_clients_as_batches_are_normalized_by_the_moments_of_all_images_together() -> None:
    """What averaged variances miss: those between the clients' means."""
    draw = torch.Generator().manual_seed(1)
    parts = [k + (k + 1) * torch.randn(8, 4, generator=draw) for k in range(3)]
    layer: Any = nn.BatchNorm1d(4)
    moments = [(part.mean(0), part.square().mean(0)) for part in parts]
    mean, square = (sum(values) / 3 for values in zip(*moments, strict=True))
    outputs = [Corrected(layer, mean - m, square - q)(part) for part, (m, q) in zip(parts, moments, strict=True)]
    torch.testing.assert_close(torch.cat(outputs), nn.BatchNorm1d(4)(torch.cat(parts)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "why"), [("group_norm", "it shares none"), ("batch_renorm", "running moments of another norm")]
)
def test_networks_without_batch_norm_are_refused(norm: str, why: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), make_norm(norm).layer(4, 2))
    with pytest.raises(RoleError, match=why):
        BNScaffold(network)
