"""FixBN against its rounds written in plain PyTorch, on every norm with running statistics, and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import NORMS
from fednorm.config import resolve
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import TRAINEE_RECORD
from fednorm.rng import torch_stream
from fednorm.roles import Kind
from strategies.fixbn import FixBN

RATE, MOMENTUM, ROUNDS = 0.05, 0.9, 4
RUNNING = sorted(
    card.name
    for card in NORMS
    if {Kind.MEAN, Kind.VAR} & {t.kind for t in card.tensors.values()}
    if card.name not in ("instance_norm", "affine_scaled_attention")  # none here: an option, and of attention
)
State = dict[str, Tensor]


def plainly(model: nn.Module, clients: Any) -> tuple[State, list[State]]:
    """Return the server's tensors after the rounds, and before each: the paper's two parts, in loops."""
    server = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    counts, history = [len(client.train) for client in clients], []
    velocity = [{key: torch.zeros_like(p) for key, p in model.named_parameters()} for _ in clients]
    for r in range(1, ROUNDS + 1):
        history.append(server)
        states = []
        for pid, client in enumerate(clients):
            model.load_state_dict(server)
            model.train()
            if 2 * r > ROUNDS:
                for layer in model.modules():
                    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                        layer.eval()
            generator = torch_stream(1, "client", pid, "round", r, "batches")
            for rows in torch.randperm(counts[pid], generator=generator).split(4):
                if len(rows) == 1:
                    continue
                images, labels = client.train.batch(rows)
                loss = functional.cross_entropy(model(pixels(images)), labels)
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                with torch.no_grad():
                    for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                        velocity[pid][key].mul_(MOMENTUM).add_(gradient)
                        parameter -= RATE * velocity[pid][key]
            states.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        server = {
            key: (sum(n * s[key].double() for n, s in zip(counts, states, strict=True)) / sum(counts)).to(t.dtype)
            if t.is_floating_point()
            else states[0][key]
            for key, t in server.items()
        }
    return server, history


def test_the_rounds_are_the_papers_two_parts(make_site: Any) -> None:
    site = make_site(
        "fixbn", model={"name": "mlp", "width": 8}, train={"momentum": MOMENTUM}, rounds={"num_rounds": ROUNDS}
    )
    assert site.bench.config.train.reset_optimizer is False  # the strategy's default
    initial = site.strategy.initial_arrays(site.bench.model)
    right, history = plainly(copy.deepcopy(site.bench.model), site.bench.federation.clients)
    after: list[State] = []
    site.strategy.start(
        site.grid,
        initial,
        num_rounds=ROUNDS,
        evaluate_every=ROUNDS,
        on_round=lambda _, arrays: after.append(unpack(arrays)),
    )
    for ours, theirs in zip(after, [*history[1:], right], strict=True):
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    statistics = [key for key in right if "running" in key or "batches" in key]
    assert len(statistics) == 12
    assert all(torch.equal(after[1][key], after[3][key]) for key in statistics)  # to the bit
    assert not torch.equal(after[1]["norm1.running_mean"], after[0]["norm1.running_mean"])
    assert not torch.equal(after[2]["norm1.weight"], after[3]["norm1.weight"])
    kept = unpack(site.grid.contexts[2].state.array_records[TRAINEE_RECORD])
    assert any("momentum_buffer" in key for key in kept)


@pytest.mark.parametrize("name", RUNNING)
def test_frozen_statistics_of_every_norm_keep_their_bits_in_training(name: str, make_site: Any) -> None:
    site = make_site("fixbn", norm={"name": name}, rounds={"num_rounds": 2})
    arrays = site.strategy.initial_arrays(site.bench.model)
    initial = unpack(arrays)
    first, second = site.train(1, 1, arrays), site.train(1, 2, arrays)
    plan = site.bench.plan.by_key
    statistics = [key for key in plan if plan[key].kind in (Kind.MEAN, Kind.VAR, Kind.QUADRATIC)]
    assert any(not torch.equal(first[key], initial[key]) for key in statistics)
    assert all(torch.equal(second[key], initial[key]) for key in statistics)
    assert not torch.equal(second["conv1.weight"], initial["conv1.weight"])
    resting = site.bench.trainee.trainable.resting
    assert len(resting) == len(site.strategy.layers) > 0
    site.train(1, 1, arrays)  # the next turn may be of an earlier round: of another client's, or after a resumption
    assert site.bench.trainee.trainable.resting == ()
    assert all(layer.training for layer in resting)


def test_which_rounds_are_fixed(make_site: Any) -> None:
    strategy = make_site("fixbn", rounds={"num_rounds": 5}).strategy
    assert [strategy.fixed(r) for r in range(1, 6)] == [False, False, True, True, True]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for share, expected in ((0.0, [True, True]), (1.0, [False, False])):
        bare = FixBN(network, share=share)
        assert not bare.fixed(1)  # nobody has said how many rounds there are
        bare.num_rounds = 2
        assert [bare.fixed(r) for r in (1, 2)] == expected


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"share .* in \[0, 1\]; got 1\.5"):
        FixBN(nn.Sequential(nn.BatchNorm2d(4)), share=1.5)
    with pytest.raises(RoleError, match=r"has none\. Build it with a norm that has them"):
        FixBN(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    grid = {
        "kind": "federated_continual",
        "scenario": {"num_experiences": 2, "train_per_experience": 16, "test_per_experience": 8},
        "model": {"width": 4},
        "strategy": {"name": "fixbn"},
    }
    with pytest.raises(ConfigError, match=r"grid\.norms = 'freeze'"):
        simulate(resolve(grid), runs=None)


def test_a_run_that_was_cut_short_in_its_second_part_ends_with_the_same_bits(tmp_path: Path) -> None:
    small = {
        "data": {"train_per_client": 12, "test_per_domain": 8},
        "model": {"name": "mlp", "width": 4},
        "train": {"batch_size": 4, "momentum": 0.9},
        "rounds": {"num_rounds": 4},
        "strategy": {"name": "fixbn"},
    }

    class Cut(Exception):
        pass

    class Cutting:
        def begin(self, _: Any, first_round: int) -> None:
            del first_round

        def round(self, line: Any) -> None:
            if line["round"] == 3:
                raise Cut

    config = resolve(small)
    whole = simulate(config, runs=tmp_path / "whole")
    with pytest.raises(Cut):
        simulate(config, runs=tmp_path / "cut", observer=Cutting())
    resumed = simulate(config, runs=tmp_path / "cut")
    assert whole["evaluation"] == resumed["evaluation"]
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in r["rounds"]] for r in (whole, resumed)]
    assert lines[0] == lines[1]
