"""Every strategy with a client side of its own, against two rounds of a federation written in plain PyTorch.

The simulation shares with fednorm the initial network, the images, and the names of the random streams that order the
batches; training, averaging, state and evaluation are written out here, from the papers' formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn
from torch.nn import functional

from fednorm.cards import STRATEGIES
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, RoleError
from fednorm.federation.local import Local, Turn
from fednorm.federation.wire import pack, unpack
from fednorm.federation.workbench import STATE_RECORD
from fednorm.rng import torch_stream
from strategies.ditto import Ditto, Personal
from strategies.fedavg import FedAvg
from strategies.scaffold import Controlled, Scaffold

State = dict[str, Tensor]
Correct = Callable[[str, Tensor], Any]
RATE, ROUNDS, HEAD = 0.05, 2, ("fc5.weight", "fc5.bias")
MLP = {"name": "mlp", "width": 8}


class Plain:
    """Two rounds of nothing but autograd and loops."""

    def __init__(self, site: Any) -> None:
        self.clients = site.bench.federation.clients
        self.initial = self.state(site.bench.model)
        self.model: nn.Module = copy.deepcopy(site.bench.model)
        self.counts = [len(client.train) for client in self.clients]
        self.keys = tuple(dict(self.model.named_parameters()))

    @staticmethod
    def state(model: nn.Module) -> State:
        return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}

    def batches(self, split: Any, names: tuple[Any, ...], epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch_stream(1, *names, "batches")
        for _ in range(epochs):
            for rows in torch.randperm(len(split), generator=generator).split(4):
                if len(rows) > 1:  # batch normalization
                    images, labels = split.batch(rows)
                    yield pixels(images), labels

    def sgd(
        self,
        start: State,
        pid: int,
        *names: Any,
        epochs: int = 1,
        only: Iterable[str] | None = None,
        correct: Correct = lambda *_: 0,
        batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[State, int]:
        """Return where SGD leads from ``start``, and after how many steps."""
        self.model.load_state_dict(start)
        self.model.train()
        trained = {key: p for key, p in self.model.named_parameters() if only is None or key in only}
        steps = 0
        for images, labels in batches or self.batches(self.clients[pid].train, ("client", pid, *names), epochs):
            loss = functional.cross_entropy(self.model(images), labels)
            gradients = torch.autograd.grad(loss, list(trained.values()))
            with torch.no_grad():
                for (key, parameter), gradient in zip(trained.items(), gradients, strict=True):
                    parameter -= RATE * (gradient + correct(key, parameter))
            steps += 1
        return self.state(self.model), steps

    def mean(self, states: list[State], keys: Iterable[str]) -> State:
        total = sum(self.counts[: len(states)])
        averaged = {}
        for key in keys:
            terms = [n * state[key].double() for n, state in zip(self.counts, states, strict=False)]
            averaged[key] = (sum(terms) / total).to(states[0][key].dtype)  # type: ignore[union-attr]
            if not states[0][key].is_floating_point():
                averaged[key] = states[0][key]
        return averaged

    def loss(self, state: State, pid: int) -> float:
        """Return a client's mean test loss."""
        self.model.load_state_dict(state)
        self.model.eval()
        split = self.clients[pid].test
        images, labels = split.batch(torch.arange(len(split)))
        with torch.no_grad():
            return functional.cross_entropy(self.model(pixels(images)), labels).item()


def near(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=3e-6, msg=lambda m, k=key: f"{k}: {m}")


class Run:
    """Two rounds of a strategy: the server's tensors, what clients keep, and their losses after it."""

    def __init__(self, make_site: Any, name: str, **options: Any) -> None:
        self.site = make_site(name, options=options, model=MLP)
        self.plain = Plain(self.site)
        strategy = self.site.strategy
        result = strategy.start(
            self.site.grid, strategy.initial_arrays(self.site.bench.model), num_rounds=ROUNDS, evaluate_every=ROUNDS
        )
        assert strategy.report.rejected == []
        self.server: State = unpack(result.arrays)
        self.losses = [report.metrics["loss"] for report in strategy.report.evaluate]

    def state(self, pid: int) -> State:
        return unpack(self.site.grid.contexts[pid + 2].state.array_records[STATE_RECORD])

    def require(self, server: State, tested: list[State]) -> None:
        near(self.server, {key: server[key] for key in self.server})
        assert self.losses == pytest.approx([self.plain.loss(state, pid) for pid, state in enumerate(tested)], rel=1e-4)

    @property
    def pids(self) -> range:
        return range(len(self.plain.clients))


def test_fedper_keeps_the_last_layer(make_site: Any) -> None:
    run = Run(make_site, "fedper")
    plain, server = run.plain, run.plain.initial
    body = [key for key in server if key not in HEAD]
    own = [{key: server[key] for key in HEAD}] * 3
    for r in range(1, ROUNDS + 1):
        states = [plain.sgd({**server, **own[pid]}, pid, "round", r)[0] for pid in run.pids]
        own = [{key: state[key] for key in HEAD} for state in states]
        server = {**plain.initial, **plain.mean(states, body)}
    assert set(run.server) == set(body)
    # a client's own batch counters go on: they count its batches, and no result depends on them
    run.require(server, [{**server, **heads} for heads in own])
    for pid in run.pids:
        near(run.site.kept(pid), own[pid])
    assert not torch.equal(own[0]["fc5.weight"], own[1]["fc5.weight"])


def test_fedrep_trains_the_head_and_then_the_body(make_site: Any) -> None:
    run = Run(make_site, "fedrep", head_epochs=2.0)
    plain, server = run.plain, run.plain.initial
    body = [key for key in server if key not in HEAD]
    learned = [key for key in plain.keys if key not in HEAD]
    own = [{key: server[key] for key in HEAD}] * 3
    for r in range(1, ROUNDS + 1):
        states = []
        for pid in run.pids:
            drawn = list(plain.batches(plain.clients[pid].train, ("client", pid, "round", r), 3))
            first = 2 * len(drawn) // 3
            headed, _ = plain.sgd({**server, **own[pid]}, pid, only=HEAD, batches=drawn[:first])
            states.append(plain.sgd(headed, pid, only=learned, batches=drawn[first:])[0])
            near({k: headed[k] for k in HEAD}, {k: states[-1][k] for k in HEAD})
        own = [{key: state[key] for key in HEAD} for state in states]
        server = {**plain.initial, **plain.mean(states, body)}
    run.require(server, [{**server, **heads} for heads in own])


def test_fedbabu_freezes_the_head_and_fine_tunes_before_an_evaluation(make_site: Any) -> None:
    run = Run(make_site, "fedbabu", finetune_epochs=2.0)
    plain, server = run.plain, run.plain.initial
    body = [key for key in server if key not in HEAD]
    learned = [key for key in plain.keys if key not in HEAD]
    for r in range(1, ROUNDS + 1):
        states = [plain.sgd(server, pid, "round", r, only=learned)[0] for pid in run.pids]
        server = {**plain.initial, **plain.mean(states, body)}
    assert set(run.server) == set(body)  # the head does not travel
    tuned = [plain.sgd(server, pid, "evaluation", "finetune", epochs=2)[0] for pid in run.pids]
    assert not torch.equal(tuned[0]["fc5.weight"], plain.initial["fc5.weight"])
    run.require(server, tuned)
    assert all(not run.site.grid.contexts[pid + 2].state for pid in run.pids)  # nothing is kept


def test_fedavg_ft_is_fedavg_that_is_tested_after_fine_tuning(make_site: Any) -> None:
    run = Run(make_site, "fedavg_ft", finetune_epochs=1.0)
    fedavg, untuned = Run(make_site, "fedavg"), Run(make_site, "fedavg_ft", finetune_epochs=0.0)
    assert all(torch.equal(run.server[key], tensor) for key, tensor in fedavg.server.items())
    assert untuned.losses == fedavg.losses
    plain = run.plain
    tuned = [plain.sgd(run.server, pid, "evaluation", "finetune")[0] for pid in run.pids]
    run.require(run.server, tuned)
    assert run.losses != fedavg.losses
    assert all(not run.site.grid.contexts[pid + 2].state for pid in run.pids)


def test_ditto_trains_a_personal_model_that_is_pulled_to_the_server(make_site: Any) -> None:
    run = Run(make_site, "ditto", lambd=0.7, personal_epochs=2.0)
    plain, server = run.plain, run.plain.initial
    own = [server] * 3
    for r in range(1, ROUNDS + 1):
        states = [plain.sgd(server, pid, "round", r)[0] for pid in run.pids]
        start = server
        own = [
            plain.sgd(own[pid], pid, "round", r, "personal", epochs=2, correct=lambda k, v, w=start: 0.7 * (v - w[k]))[
                0
            ]
            for pid in run.pids
        ]
        server = plain.mean(states, server)
    run.require(server, own)
    for pid in run.pids:
        near(run.state(pid), own[pid])
    fedavg = Run(make_site, "fedavg")
    assert all(torch.equal(run.server[key], tensor) for key, tensor in fedavg.server.items())


def test_local_is_training_alone(make_site: Any) -> None:
    run = Run(make_site, "local")
    plain = run.plain
    own = [plain.initial] * 3
    for r in range(1, ROUNDS + 1):
        own = [plain.sgd(own[pid], pid, "round", r)[0] for pid in run.pids]
    assert run.server == {}
    run.require({}, own)
    for pid in run.pids:
        near(run.site.kept(pid), own[pid])


def test_centralized_is_one_training_on_the_union_of_the_images(make_site: Any) -> None:
    run = Run(make_site, "centralized")
    plain, server = run.plain, run.plain.initial
    assert plain.counts == [22, 0, 0]
    originals = [client.train for client in make_site("fedavg", model=MLP).bench.federation.clients]
    parts = [split.batch(torch.arange(len(split))) for split in originals]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    for r in range(1, ROUNDS + 1):
        order = torch.randperm(22, generator=torch_stream(1, "client", 0, "round", r, "batches"))
        batches = [(pixels(images[rows]), labels[rows]) for rows in order.split(4)]
        server, steps = plain.sgd(server, 0, batches=batches)
        assert steps == 6
    run.require(server, [server] * 3)
    assert run.site.strategy.report.sampled == (0,)


@pytest.mark.parametrize(("weighting", "eta_g"), [("examples", 1.0), ("equal", 0.6)])
def test_scaffold_is_its_algorithm_with_option_two(weighting: str, eta_g: float, make_site: Any) -> None:
    site = make_site("scaffold", options={"server_learning_rate": eta_g}, model=MLP, rounds={"weighting": weighting})
    plain = Plain(site)
    arrays = site.strategy.initial_arrays(site.bench.model)
    result = site.strategy.start(site.grid, arrays, num_rounds=ROUNDS, evaluate_every=ROUNDS)
    counts = plain.counts if weighting == "examples" else [1, 1, 1]
    plain.counts = counts
    x, c = plain.initial, {key: torch.zeros_like(plain.initial[key]) for key in plain.keys}
    own = [c] * 3
    for r in range(1, ROUNDS + 1):
        states, changes = [], []
        for pid in range(3):
            y, steps = plain.sgd(x, pid, "round", r, correct=lambda k, _, p=pid, s=c, o=own: s[k] - o[p][k])
            new = {k: own[pid][k] - c[k] + (x[k] - y[k]) / (steps * RATE) for k in plain.keys}
            changes.append({k: new[k] - own[pid][k] for k in plain.keys})
            own[pid] = new
            states.append(y)
        mean = plain.mean(states, x)
        x = {k: x[k] + eta_g * (t - x[k]) if k in plain.keys else t for k, t in mean.items()}
        c = {k: c[k] + change for k, change in plain.mean(changes, plain.keys).items()}
        own = list(own)
    near(unpack(result.arrays), x)
    for pid in range(3):
        kept = unpack(site.grid.contexts[pid + 2].state.array_records[STATE_RECORD])
        for key in plain.keys:
            torch.testing.assert_close(kept[key], own[pid][key], rtol=1e-3, atol=1e-4)
    for key, tensor in site.strategy.state_dict().items():
        torch.testing.assert_close(tensor, c[key.removeprefix("control/")], rtol=1e-3, atol=1e-4)


# On quadratics ------------------------------------------------------------------------------------------------------

CURVATURE, CENTRE = (0.5, 2.0, 6.0), (-1.0, 0.5, 2.0)


def quadratic(turn: Turn) -> Tensor:
    """Return F_k(w) = a_k / 2 ||w - b_k||^2, whatever the images."""
    pid = turn.client.partition_id
    return sum(CURVATURE[pid] / 2 * (p - CENTRE[pid]).square().sum() for p in turn.model.parameters())  # type: ignore


class PlainQuadratic(Local):
    def loss(self, turn: Turn, *_: Tensor) -> Tensor:
        return quadratic(turn)


class ControlledQuadratic(Controlled):
    def loss(self, turn: Turn, *_: Tensor) -> Tensor:
        return quadratic(turn)


class PersonalQuadratic(Personal):
    def loss(self, turn: Turn, *_: Tensor) -> Tensor:
        return quadratic(turn)


class QuadraticFedAvg(FedAvg):
    local = PlainQuadratic


class QuadraticScaffold(Scaffold):
    local = ControlledQuadratic


class QuadraticDitto(Ditto):
    local = PersonalQuadratic


def after(make_site: Any, strategy: type, rounds: int, **options: Any) -> Any:
    site = make_site(
        STRATEGIES.add(strategy),
        options=options,
        norm={"name": "none"},
        model={"name": "mlp", "width": 2},
        rounds={"weighting": "equal"},
        train={"local_steps": 5},
    )
    arrays = site.strategy.initial_arrays(site.bench.model)
    result = site.strategy.start(site.grid, arrays, num_rounds=rounds, evaluate_every=10**6)
    values = torch.cat([tensor.flatten() for tensor in unpack(result.arrays).values()])
    return site, values


def test_scaffold_finds_the_optimum_where_fedavg_drifts(make_site: Any) -> None:
    optimum = sum(a * b for a, b in zip(CURVATURE, CENTRE, strict=True)) / sum(CURVATURE)
    shrink = [(1 - RATE * a) ** 5 for a in CURVATURE]
    drifted = sum((1 - s) * b for s, b in zip(shrink, CENTRE, strict=True)) / sum(1 - s for s in shrink)
    assert abs(drifted - optimum) > 0.1
    _, fedavg = after(make_site, QuadraticFedAvg, 25)
    torch.testing.assert_close(fedavg, torch.full_like(fedavg, drifted), rtol=0, atol=1e-4)
    _, scaffold = after(make_site, QuadraticScaffold, 30)
    torch.testing.assert_close(scaffold, torch.full_like(scaffold, optimum), rtol=0, atol=1e-4)


def test_ditto_ends_at_the_minimum_of_the_personal_objective(make_site: Any) -> None:
    lambd = 1.5
    site, server = after(make_site, QuadraticDitto, 20, lambd=lambd, personal_epochs=4.0)
    w = server[0].item()
    for pid, (a, b) in enumerate(zip(CURVATURE, CENTRE, strict=True)):
        own = unpack(site.grid.contexts[pid + 2].state.array_records[STATE_RECORD])
        for tensor in own.values():
            torch.testing.assert_close(
                tensor, torch.full_like(tensor, (a * b + lambd * w) / (a + lambd)), atol=1e-3, rtol=0
            )


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"optimizer": "adam"}}, "train.optimizer=adam"),
        ({"train": {"momentum": 0.9}}, "train.momentum=0.9"),
        ({"train": {"agc": 0.1}}, "train.agc=0.1"),
        ({"train": {"clip_norm": 10.0}}, "train.clip_norm=10.0"),
        ({"train": {"weight_clip": 2.0}}, "train.weight_clip=2.0"),
        ({"train": {"hyperspherical": True}}, "train.hyperspherical=True"),
        ({"train": {"cbp_rate": 0.1}}, "train.cbp_rate=0.1"),
        ({"train": {"snr_eta": 0.1}}, "train.snr_eta=0.1"),
        ({"norm": {"name": "nap"}}, "norm nap"),
    ],
)
def test_scaffold_refuses_what_its_formula_does_not_hold_for(
    sections: dict[str, Any], words: str, make_site: Any
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_site("scaffold", **sections)
    make_site("scaffold", train={"weight_decay": 0.01, "l2_init": 0.01})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedper", {"head": ""}, "strategy.head names the layers"),
        ("fedper", {"head": "fc9.*"}, "nearest: fc"),
        ("fedrep", {"head_epochs": 0.0}, "strategy.head_epochs"),
        ("fedbabu", {"finetune_epochs": -1.0}, "strategy.finetune_epochs"),
        ("fedavg_ft", {"finetune_epochs": -0.5}, "strategy.finetune_epochs"),
        ("ditto", {"lambd": -1.0}, "strategy.lambd"),
        ("ditto", {"personal_epochs": 0.0}, "strategy.personal_epochs"),
        ("scaffold", {"server_learning_rate": 0.0}, "eta_g"),
        ("centralized", {"local": "head"}, "one trainer"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], words: str, make_site: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        make_site(name, options=options)


@pytest.mark.parametrize(("name", "options"), [("fedavg", {"local": "*"}), ("fedper", {"head": "*"})])
def test_a_strategy_that_would_send_nothing_is_refused(name: str, options: dict[str, Any], make_site: Any) -> None:
    with pytest.raises(RoleError, match="nothing would be averaged"):
        make_site(name, options=options)


def test_a_bad_extra_is_a_rejected_client(make_site: Any) -> None:
    site = make_site("scaffold", model=MLP)
    strategy, arrays = site.strategy, site.strategy.initial_arrays(site.bench.model)
    messages = strategy.configure_train(1, arrays, ConfigRecord(), site.grid)
    replies = list(site.grid.send_and_receive(messages))
    good = unpack(replies[2].content.array_records["extra"])
    spoiled = {**good, "fc5.bias": good["fc5.bias"][:1]}
    replies[0].content["extra"] = pack({**good, "fc5.bias": torch.full_like(good["fc5.bias"], torch.nan)})
    replies[1].content["extra"] = pack(spoiled)
    new, _ = strategy.aggregate_train(1, replies)
    assert dict(strategy.report.rejected) == {
        0: "extra fc5.bias has NaN or infinite values",
        1: "fc5.bias has shape (1,); expected (3,)",
    }
    assert new is not None
    # one of three clients took part
    torch.testing.assert_close(strategy.state_dict()["control/fc5.bias"], good["fc5.bias"] / 3)
