"""Every key by which a client trains, against a loop in plain PyTorch, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler

from fednorm.config import resolve
from fednorm.data.augment import Augmentation
from fednorm.federation.estimate import estimate_seconds, images_of_round
from fednorm.federation.simulate import simulate
from fednorm.federation.wire import pack
from fednorm.federation.workbench import TRAINEE_RECORD
from fednorm.records.record import RunRecord
from fednorm.rng import torch_stream

State = dict[str, Tensor]
NORM = {"name": "group_norm", "num_groups": 2}
RATE, BATCH, COUNT = 0.05, 4, 9
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def site_in_double(make_site: Any, **train: Any) -> Any:
    """Return a site whose model, and all that its clients compute, is in double precision."""
    site = make_site(norm=NORM, train=train, rounds={"num_rounds": 6})
    bench = site.bench
    bench.model.double()
    bench._state = bench.model.state_dict()
    bench._initial = {key: tensor.double() for key, tensor in bench._initial.items()}
    original = bench.trainee.augmentation
    bench.trainee.augmentation = lambda images, generator: original(images, generator).double().div(127.5).sub(1)
    return site


def batches(pid: int, server_round: int, wanted: int) -> list[Tensor]:
    """Return the rows of a round's batches, drawn as the documentation says: pass after pass in a new order."""
    generator = torch_stream(1, "client", pid, "round", server_round, "batches")
    rows: list[Tensor] = []
    while len(rows) < wanted:
        rows += torch.split(torch.randperm(COUNT, generator=generator), BATCH)
    return rows[:wanted]


class Plain:
    """A client in plain PyTorch: a copy of the model, an optimizer, a loop."""

    def __init__(self, site: Any, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.model: nn.Module = copy.deepcopy(site.bench.model).train()
        self.client = site.bench.federation.clients[0]
        self.make = optimizer
        self.optimizer = optimizer(self.model.parameters())
        self.clip = self.smoothing = 0.0

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        where = self.client.train.index[rows]
        return self.client.train.images[where].double() / 127.5 - 1, self.client.train.labels[where]

    def extra(self) -> Tensor | float:
        """Return what is added to the loss."""
        return 0.0

    def round(self, server_round: int, *, steps: int = 3, fresh: bool = True) -> State:
        if fresh:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.optimizer = self.make(self.model.parameters())
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        for rows in batches(0, server_round, steps):
            images, labels = self.batch(rows)
            logits = self.model(images)
            # Smoothed labels, written out: 1 - s on the class and s / K on every class.
            smooth = torch.full_like(logits, self.smoothing / logits.shape[1])
            smooth += (1 - self.smoothing) * functional.one_hot(labels, logits.shape[1]).double()
            loss = -(smooth * logits.log_softmax(1)).sum(1).mean() + self.extra()
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
        return {key: tensor.clone() for key, tensor in self.model.state_dict().items()}


def rounds(site: Any, count: int) -> Iterator[State]:
    """Train client 0 for rounds, each from the tensors that it sent in the one before."""
    arrays = None
    for server_round in range(1, count + 1):
        sent = site.train(0, server_round, arrays)
        yield sent
        arrays = pack(sent)


def require_close(ours: State, theirs: State) -> None:
    assert ours.keys() <= theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), theirs[key].double(), rtol=1e-9, atol=1e-11)


def moved(a: State, b: State) -> float:
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


# Optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
        ("adam", {}),
        ("adam", {"weight_decay": 0.1}),
        ("adamw", {"weight_decay": 0.1}),
    ],
)
def test_an_optimizer_is_pytorchs_kept_or_begun_anew(
    name: str, options: dict[str, float], reset: bool, make_site: Any
) -> None:
    site = site_in_double(make_site, optimizer=name, reset_optimizer=reset, **options)
    plain = Plain(site, lambda parameters: OPTIMIZERS[name](parameters, lr=RATE, **options))
    for number, ours in enumerate(rounds(site, 3), start=1):
        require_close(ours, plain.round(number, fresh=reset))
    assert (TRAINEE_RECORD in site.grid.contexts[2].state) == (not reset and (name, options) != ("sgd", {}))


def test_clients_keep_moments_of_their_own(make_site: Any) -> None:
    """Client 0 alone, and with others training in between, is the same."""
    alone, among = (site_in_double(make_site, optimizer="adam", reset_optimizer=False) for _ in range(2))
    first = alone.train(0, 1)
    second = alone.train(0, 2, pack(first))
    assert moved(among.train(0, 1), first) == 0
    among.train(1, 1)
    among.train(2, 1)
    assert moved(among.train(0, 2, pack(first)), second) == 0


# The schedule over rounds ----------------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "step": (
        {"schedule": "step", "decay": 0.5, "decay_every": 2},
        lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    ),
    "exponential": (
        {"schedule": "exponential", "decay": 0.998},
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.998),
    ),
    "cosine": (
        {"schedule": "cosine", "final_rate": 0.1},
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=0.1 * RATE),
    ),
    "linear": (
        {"schedule": "linear", "final_rate": 0.1},
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6),
    ),
    "warm-up": (
        {"schedule": "exponential", "decay": 0.5, "warmup_steps": 3},
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, 2), lr_scheduler.ExponentialLR(optimizer, 0.5)],
            milestones=[3],
        ),
    ),
}


@pytest.mark.few(3)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_over_rounds_is_pytorchs(name: str, make_site: Any) -> None:
    train, make = SCHEDULES[name]
    site = site_in_double(make_site, **train)
    plain = Plain(site, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    scheduler, optimizer = make(plain.optimizer), plain.optimizer
    rates = set()
    for number, ours in enumerate(rounds(site, 6), start=1):
        rate = optimizer.param_groups[0]["lr"]
        assert site.bench.trainee.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
        require_close(ours, plain.round(number, fresh=False))
        rates.add(round(rate, 12))
        scheduler.step()
    assert len(rates) >= 3


def test_the_rate_is_the_rounds_also_for_a_client_that_was_not_sampled_before(make_site: Any) -> None:
    site = site_in_double(make_site, schedule="exponential", decay=0.5)
    site.train(1, 4)
    assert site.bench.trainee.optimizer.param_groups[0]["lr"] == RATE * 0.5**3


# Loss and gradients ----------------------------------------------------------------------------------------------


def test_label_smoothing_spreads_a_share_over_all_classes(make_site: Any) -> None:
    site = site_in_double(make_site, label_smoothing=0.3)
    plain, sharp = (Plain(site, lambda parameters: torch.optim.SGD(parameters, lr=RATE)) for _ in range(2))
    plain.smoothing = 0.3
    ours = site.train(0, 1)
    require_close(ours, plain.round(1))
    assert moved(ours, sharp.round(1)) > 1e-3


def test_clip_norm_is_pytorchs(make_site: Any) -> None:
    site = site_in_double(make_site, clip_norm=0.3)
    plain, free = (Plain(site, lambda parameters: torch.optim.SGD(parameters, lr=RATE)) for _ in range(2))
    plain.clip = 0.3
    ours = site.train(0, 1)
    # PyTorch divides by the norm + 1e-6.
    theirs = plain.round(1)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6)
    assert moved(ours, free.round(1)) > 1e-3


def test_a_long_enough_limit_changes_nothing(make_site: Any) -> None:
    clipped, free = (site_in_double(make_site, clip_norm=limit).train(0, 1) for limit in (1e6, 0.0))
    assert moved(clipped, free) == 0


def test_l2_init_pulls_to_the_initial_weights_not_to_the_servers(make_site: Any) -> None:
    site = site_in_double(make_site, l2_init=0.5)

    class Pulled(Plain):
        def extra(self) -> Tensor | float:
            return 0.5 * sum((p - p0).square().sum() for p, p0 in zip(self.model.parameters(), initial, strict=True))

    plain = Pulled(site, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    initial = [parameter.detach().clone() for parameter in plain.model.parameters()]
    for number, ours in enumerate(rounds(site, 2), start=1):
        require_close(ours, plain.round(number))


def test_projected_weights_keep_their_initial_norm(make_site: Any) -> None:
    site, free = site_in_double(make_site, project=True), site_in_double(make_site)
    before = {key: t.clone() for key, t in site.bench.model.state_dict().items() if t.ndim == 4}
    after = list(rounds(site, 2))[-1]
    for key, tensor in before.items():
        assert float(after[key].norm()) == pytest.approx(float(tensor.norm()), rel=1e-6)  # measured in single precision
    longer = free.train(0, 1)
    assert any(float(longer[key].norm()) != pytest.approx(float(t.norm()), rel=1e-4) for key, t in before.items())


def test_redo_counts_each_clients_own_updates(make_site: Any) -> None:
    """Clients 0, 1 and 2 make three, two and two updates a round; nobody counts another's."""
    site = make_site(norm=NORM, train={"redo_every": 4, "redo_tau": 0.9})
    (redo,) = [effect for effect in site.bench.trainee.effects if type(effect).__name__ == "ReDo"]
    counts = []
    for pid, server_round in ((0, 1), (1, 1), (0, 2), (2, 2), (1, 3)):
        site.train(pid, server_round)
        counts.append(sum(int(t) for key, t in redo.state_dict().items() if "updates" in key or "count" in key))
    assert counts == [3, 2, 6, 2, 4]


@pytest.mark.parametrize("key", ["cbp_rate", "snr_eta"])
def test_units_have_an_age_and_a_past_of_their_own_at_each_client(key: str, make_site: Any) -> None:
    site = make_site(norm=NORM, train={key: 0.01})
    (effect,) = site.bench.trainee.after
    lived = []
    for pid, server_round in ((0, 1), (1, 1), (0, 2), (2, 2), (1, 3)):
        site.train(pid, server_round)
        times = effect.ages[0] if key == "cbp_rate" else effect.past[0].sum(1) + effect.silent[0]
        lived.append((effect.updates, int(times.max())))
    assert lived == [(3, 3), (2, 2), (6, 6), (2, 2), (4, 4)]


# How long a round is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"local_epochs": 1}, 3),
        ({"local_epochs": 3}, 9),
        ({"local_epochs": 0.5}, 2),  # round(1.5) to even
        ({"local_epochs": 1.67}, 5),
        ({"local_epochs": 0.01}, 1),
        ({"local_steps": 1}, 1),
        ({"local_steps": 7}, 7),
        ({"local_steps": 2, "local_epochs": 5}, 2),
    ],
)
def test_a_round_has_the_steps_that_were_asked_for(train: dict[str, Any], steps: int, make_site: Any) -> None:
    site = site_in_double(make_site, **train)
    plain = Plain(site, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    for number, ours in enumerate(rounds(site, 2), start=1):
        require_close(ours, plain.round(number, steps=steps))


# Augmentation and scaling ----------------------------------------------------------------------------------------


def test_a_client_augments_what_it_trains_on_and_not_what_it_is_scored_on(make_site: Any) -> None:
    site = make_site(norm=NORM, train={"augment": "flip,rotate", "rotate_degrees": 90.0})
    seen: list[Tensor] = []
    site.bench.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    site.train(0, 2)
    train = site.bench.federation.clients[0].train
    generator = torch_stream(1, "client", 0, "round", 2, "augment")
    for rows, ours in zip(batches(0, 2, 3), seen, strict=True):
        images = Augmentation(("flip", "rotate"), degrees=90.0)(train.batch(rows)[0], generator)
        assert torch.equal(ours, images.float() / 127.5 - 1)
    seen.clear()
    site.evaluate(0)
    test = site.bench.federation.clients[0].test
    assert torch.equal(torch.cat(seen), test.images[test.index].float() / 127.5 - 1)


# A client is a learner -------------------------------------------------------------------------------------------


def test_a_clients_training_is_a_learners_with_the_same_batches(make_site: Any) -> None:
    """One round of E passes, and a Naive learner's E epochs, under the same order of batches."""
    from fednorm.avalanche.benchmark import to_avalanche
    from fednorm.streams.stream import Experience, Stream
    from scenarios.learners.naive import Naive

    keys = {"optimizer": "adam", "clip_norm": 0.5, "label_smoothing": 0.1, "l2_init": 0.01, "project": True}
    site, other = (make_site(norm=NORM, train={"local_epochs": 2, **keys}) for _ in range(2))
    ours = site.train(0, 1)
    client, trainee = other.bench.federation.clients[0], other.bench.trainee
    experience = Experience(0, "all", (0, 1, 2), client.train, client.validation, client.test)
    stream = Stream("one", 3, 4, (experience,), (0, 1, 2))
    learner = Naive(
        model=trainee.model,
        optimizer=trainee.optimizer,
        num_classes=3,
        train_mb_size=BATCH,
        train_epochs=2,
        adjust=trainee.adjust,
        after=trainee.after,
        criterion=trainee.loss,
    )
    order = iter(torch.cat(batches(0, 1, 6)).split(COUNT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda *_, **__: next(order))
        learner.train(to_avalanche(stream).train_stream)
    theirs = trainee.model.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


# Cut short and gone on with --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Killer:
    """Ends a run after a round, as an interruption would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def begin(self, bench: Any, first_round: int) -> None:
        pass

    def round(self, line: Any) -> None:
        if line["round"] == self.after:
            raise Killed


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adam", "reset_optimizer": False, "learning_rate": 0.005},
        pytest.param(
            {"optimizer": "adamw", "reset_optimizer": False, "weight_decay": 0.1, "schedule": "cosine"},
            marks=pytest.mark.slow,
        ),
        {"momentum": 0.9, "reset_optimizer": False, "augment": "jitter,crop_flip", "redo_every": 5},
        {"optimizer": "upgd", "reset_optimizer": False, "sigma": 0.1, "cbp_rate": 0.05, "cbp_maturity": 2},
        {"optimizer": "adamp", "reset_optimizer": False, "weight_decay": 0.1, "delta": 9.0, "trainable": "norm,head"},
        pytest.param(
            {"optimizer": "sgdp", "momentum": 0.9, "reset_optimizer": False, "delta": 9.0, "linear_probe_rounds": 3},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_cut_short_goes_on_to_the_same_bits(train: dict[str, Any], tmp_path: Any) -> None:
    values = {
        "data": {"train_per_client": 24, "test_per_domain": 6},
        "model": {"width": 4},
        "strategy": {"name": "fedbn"},
        "rounds": {"num_rounds": 4, "fraction": 0.5, "checkpoint_every": 1},
        "train": {"batch_size": 8, **train},
    }
    config = resolve(values)
    whole = simulate(config, runs=tmp_path / "whole")
    with pytest.raises(Killed):
        simulate(config, runs=tmp_path / "cut", observer=Killer(2))
    cut = simulate(config, runs=tmp_path / "cut")
    assert cut["final"] == whole["final"]
    for name in ("model.safetensors", "clients.safetensors"):
        ours, theirs = (load_file(RunRecord(tmp_path / place, config).folder / name) for place in ("cut", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


# What it will take -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "images"),
    [
        ({"local_epochs": 3}, 27),
        ({"local_epochs": 0.5}, 8),
        ({"local_epochs": 1.67}, 17),
        ({"local_steps": 1}, 4),
        ({"local_steps": 7, "local_epochs": 99}, 22),
    ],
)
def test_the_estimate_counts_the_images_that_a_round_sees(train: dict[str, Any], images: int, make_site: Any) -> None:
    site = make_site(norm=NORM, train=train)
    seen: list[int] = []
    hook = site.bench.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    site.train(0, 1)
    hook.remove()
    assert sum(seen) == images_of_round(site.bench.config.train, COUNT) == images


def test_a_measurement_is_of_one_pass_however_long_a_round_is(make_site: Any) -> None:
    site = make_site(norm=NORM, train={"local_steps": 10**6, "warmup_steps": 0, "schedule": "cosine"})
    assert estimate_seconds(site.bench) > 10**5 * 1e-5
