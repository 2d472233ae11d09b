"""DER++ against plain PyTorch, and the logits that it stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.streams.buffer import ReservoirBuffer, Samples


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]).mean()


@pytest.mark.few(2)
@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.5), (0.7, 0.0)])
def test_the_loss_is_the_papers(
    alpha: float, beta: float, passes: str, build: Any, watch: Any, retrace: Any, experiences: list[Any]
) -> None:
    learner = build("derpp", alpha=alpha, beta=beta, passes=passes, memory_size=30, memory_batch=6)
    memory = ReservoirBuffer(30, num_classes=10, seed=5)
    losses = []

    def loss_of(model: nn.Module, new: Samples) -> Tensor:
        if len(memory):
            first, second = memory.draw(6), memory.draw(6)
            groups = [pixels(group.images) for group in (new, first, second)]
            if passes == "joint":
                logits, dark, remembered = model(torch.cat(groups)).split([len(new), 6, 6])
            else:
                logits, dark, remembered = map(model, groups)
            squares = sum(((dark[i] - first.logits[i]) ** 2).sum() for i in range(6)) / (6 * 10)
            loss = cross_entropy(logits, new.labels) + alpha * squares + beta * cross_entropy(remembered, second.labels)
        else:
            logits = model(pixels(new.images))
            loss = cross_entropy(logits, new.labels)
        memory.add(new.images, new.labels, new.tasks, logits)
        losses.append(loss.item() * len(new))
        return loss

    batches = watch(learner)
    learner.train(experiences[:2])
    retrace([*batches.states, learner.model.state_dict()], batches, loss_of)
    assert float(learner.tally.loss_sum) == pytest.approx(sum(losses[5:]), rel=1e-4)


def test_logits_are_those_of_the_augmented_sample_before_the_update(build: Any, experiences: list[Any]) -> None:
    learner = build("derpp", augment="crop_flip", memory_size=100)
    outputs: list[Tensor] = []
    learner.model.register_forward_hook(lambda *given: outputs.append(given[2].detach().clone()))
    learner.train(experiences[0])
    held = learner.buffer.everything()
    assert held.logits.dtype == torch.float32
    # The reservoir is not full, so that its slots are in the order in which samples came; new samples stand first.
    assert torch.equal(held.logits, torch.cat([output[:8] for output in outputs]))
    assert [len(output) for output in outputs] == [8, 24, 24, 24, 24]


def test_the_two_draws_are_independent(build: Any, experiences: list[Any]) -> None:
    learner = build("derpp")
    drawn: list[Tensor] = []
    draw = learner.buffer.draw

    def keep(count: int) -> Any:
        samples = draw(count)
        drawn.append(samples.images)
        return samples

    learner.buffer.draw = keep
    learner.train(experiences[0])
    assert len(drawn) == 8
    assert not torch.equal(drawn[-1], drawn[-2])


@pytest.mark.parametrize(("batch", "memory", "ratio"), [(8, 0, 0), (8, 4, 1), (12, 2, 3), (12, 5, 0)])
def test_the_ratio_counts_both_draws(batch: int, memory: int, ratio: int, build: Any) -> None:
    assert build("derpp", memory_batch=memory).options.batch_ratio(batch) == ratio
    assert build("derpp", memory_batch=memory, passes="separate").options.batch_ratio(batch) == 0


def test_factors_are_not_negative(build: Any) -> None:
    for option in ("alpha", "beta"):
        with pytest.raises(ConfigError, match=f"learner.{option} is a factor .* got -0.1"):
            build("derpp", **{option: -0.1})
        with pytest.raises(ConfigError, match=f"learner.{option} must be a finite number; got 'x'"):
            build("derpp", **{option: "x"})
    with pytest.raises(ConfigError, match="memory_size is 0"):
        build("derpp", memory_size=0)
