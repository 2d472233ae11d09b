"""GDumb: the memory is all that it learns from, each time from the same weights, on the official code's schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.rng import torch_stream
from fednorm.streams.buffer import BalancedBuffer
from fednorm.training.schedule import Schedule
from scenarios.learners.gdumb import GDumbOptions


def official_rates(epochs: int) -> list[float]:
    """The learning rate of each epoch, from 0.05 to 0.0005, by PyTorch's schedule used as the official code uses it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=0.0005)
    rates = [0.005, 0.05]
    for _ in range(2, epochs):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_a_network_is_trained_on_the_memory_alone_from_the_same_weights(
    build: Any, bare: Any, watch: Any, retrace: Any, state: Any, experiences: list[Any]
) -> None:
    model, _ = bare()
    states: list[dict[str, Tensor]] = []
    norms: list[float] = []

    def look() -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in learner.model.parameters()]).norm()))

    learner = build(
        "gdumb", memory_size=22, memory_epochs=5, clip=9.0, train_mb_size=7,
        adjust=[look], after=[lambda: states.append(state(learner.model))],
    )  # fmt: skip
    memory = BalancedBuffer(22, num_classes=10, seed=5)
    for number, experience in enumerate(experiences[:3]):
        batches = watch(learner)
        states[:] = [state(model)]
        learner.train(experience)
        for new in batches:
            memory.add(new.images, new.labels, new.tasks)
        held = memory.everything()
        # Three batches of seven an epoch: that of the one image left over has no variance.
        orders = [
            torch.randperm(22, generator=torch_stream(5, "memory", number, "epoch", e, "order")) for e in range(5)
        ]
        rows = [rows for order in orders for rows in order.split(7)[:3]]
        retrace(
            states,
            rows,
            lambda model, rows, held=held: (
                -model(pixels(held.images[rows])).log_softmax(1)[torch.arange(7), held.labels[rows]].mean()
            ),
            rates=[rate for rate in official_rates(5) for _ in range(3)],
            clip=9.0,
        )
        assert all(torch.equal(value, states[-1][key]) for key, value in learner.model.state_dict().items())
    assert sorted(held.labels.bincount().tolist()) == [3, 3, 4, 4, 4, 4]
    assert min(norms) < 9 < max(norms)


def test_nothing_is_learned_before_an_experience_ends(
    build: Any, watch: Any, state: Any, experiences: list[Any]
) -> None:
    learner = build("gdumb", "adab2n", memory_epochs=1, augment="crop_flip", train_epochs=2)
    during: list[dict[str, Tensor]] = []

    class Look:
        def after_training_iteration(self, strategy: Any) -> None:
            during.append(state(strategy.model))

    learner.plugins.append(Look())
    for experience in experiences[:2]:
        before = state(learner.model)
        during.clear()
        batches = watch(learner)
        learner.train(experience)
        assert len(during) == 10
        assert all(torch.equal(value, before[key]) for each in during for key, value in each.items())
        assert not torch.equal(learner.model.conv1.weight, before["conv1.weight"])
        # Online accuracy is that of the network before, in evaluation mode, on images as they are, in the first pass.
        learner_after, hits, losses = state(learner.model), 0, 0.0
        learner.model.load_state_dict(before)
        learner.model.eval()
        with torch.no_grad():
            for number, new in enumerate(batches):
                logits = learner.model(pixels(new.images))
                hits += int((logits.argmax(1) == new.labels).sum()) if number < 5 else 0
                losses += float(nn.functional.cross_entropy(logits, new.labels, reduction="sum"))
        learner.model.load_state_dict(learner_after)
        learner.model.train()
        assert (int(learner.hits), learner.met, learner.tally.seen) == (hits, 40, 80)
        assert float(learner.tally.loss_sum) == pytest.approx(losses, rel=1e-5)


def test_the_memory_takes_each_image_once(build: Any, experiences: list[Any]) -> None:
    learner = build("gdumb", memory_epochs=1, train_epochs=3, memory_size=100)
    learner.train(experiences[0])
    images = [image.numpy().tobytes() for image in learner.buffer.everything().images]
    assert len(images) == len(set(images)) == 40


def test_statistics_counters_and_momentum_start_anew(build: Any, experiences: list[Any]) -> None:
    learner = build("gdumb", "adab2n", memory_size=20, memory_epochs=2)
    counts = []
    for experience in experiences[:3]:
        learner.train(experience)
        counts.append(int(learner.model.norm1.num_batches_tracked))
    assert counts == [6, 6, 6]

    first = build("gdumb", memory_size=20, memory_epochs=2, momentum=0.9)
    first.optimizer.zero_grad()
    for parameter in first.model.parameters():
        first.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 100.0)
    other = build("gdumb", memory_size=20, memory_epochs=2, momentum=0.9)
    for learner in (first, other):
        learner.train(experiences[0])
    assert all(map(torch.equal, first.model.parameters(), other.model.parameters()))


def test_the_rates_are_the_official_codes() -> None:
    options = GDumbOptions()
    rates = [0.05 * options.rate(epoch) for epoch in range(256)]
    assert rates == pytest.approx(official_rates(256), rel=1e-9)
    assert min(rates) == rates[255]
    assert options.rate(options.memory_epochs - 1) < 0.03


def test_the_rate_is_the_optimizers_before_and_after_whatever_the_schedule(build: Any, experiences: list[Any]) -> None:
    plain = build("gdumb", memory_size=20, memory_epochs=4)
    falling = build("gdumb", memory_size=20, memory_epochs=4, schedule=Schedule(rate=0.05, kind="linear", total=10))
    for learner in (plain, falling):
        learner.train(experiences[:2])
        assert learner.optimizer.param_groups[0]["lr"] == 0.05
    assert all(map(torch.equal, plain.model.parameters(), falling.model.parameters()))


def test_effects_act_where_the_memory_is_learned(build: Any, bare: Any, state: Any, experiences: list[Any]) -> None:
    model, _ = bare()
    initial = state(model)
    calls: list[str] = []

    def begin(number: int) -> None:
        assert all(torch.equal(value, initial[key]) for key, value in learner.model.state_dict().items())
        calls.append(f"begin {number}")

    learner = build(
        "gdumb", memory_size=20, memory_epochs=1, train_mb_size=10, begin=[begin],
        adjust=[lambda: calls.append("adjust")], after=[lambda: calls.append("after")],
    )  # fmt: skip
    learner.train(experiences[:2])
    assert calls == ["adjust", "after"] * 2 + ["begin 1"] + ["adjust", "after"] * 2


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("memory_size", 0, "must be an integer of 1 or more; got 0"),
        ("memory_epochs", 0, "must be an integer of 1 or more; got 0"),
        ("final_rate", 2, "is a share, 0 to 1; got 2"),
        ("final_rate", -0.1, "is a share, 0 to 1; got -0.1"),
        ("clip", -1, "must be 0 or more; got -1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str, build: Any) -> None:
    with pytest.raises(ConfigError, match=f"learner.{option} {expected}"):
        build("gdumb", **{option: value})


def test_a_memory_smaller_than_the_number_of_classes_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match="cannot hold a sample of each of the 10 classes"):
        build("gdumb", memory_size=9)
