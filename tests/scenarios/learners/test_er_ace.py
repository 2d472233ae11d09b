"""ER-ACE: the loss with its mask against a loop over samples and classes, and when mask and replay begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.streams.buffer import ReservoirBuffer, Samples


def masked_cross_entropy(logits: Tensor, labels: Tensor, allowed: set[int]) -> Tensor:
    """The mean over samples of -log of the softmax among some classes."""
    losses = [torch.stack([row[k] for k in sorted(allowed)]).exp().sum().log() - row[y]
              for row, y in zip(logits, labels.tolist(), strict=True)]  # fmt: skip
    return torch.stack(losses).mean()


@pytest.mark.few(2)
@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize(("task_free", "starts"), [(False, 5), (True, 1)])
def test_the_loss_is_the_papers(
    task_free: bool, starts: int, passes: str, build: Any, watch: Any, retrace: Any, experiences: list[Any]
) -> None:
    learner = build("er_ace", passes=passes, task_free=task_free, memory_size=30)
    memory = ReservoirBuffer(30, num_classes=10, seed=5)
    seen: set[int] = set()
    allowed: list[set[int]] = []

    def loss_of(model: nn.Module, new: Samples) -> Tensor:
        present = set(new.labels.tolist())
        seen.update(present)
        if len(allowed) < starts:
            allowed.append(set(range(10)))
            loss = masked_cross_entropy(model(pixels(new.images)), new.labels, allowed[-1])
        else:
            allowed.append(present | (set(range(10)) - seen))
            old = memory.draw(len(new))
            groups = [pixels(new.images), pixels(old.images)]
            if passes == "joint":
                logits, remembered = model(torch.cat(groups)).split(len(new))
            else:
                logits, remembered = map(model, groups)
            loss = masked_cross_entropy(logits, new.labels, allowed[-1])
            loss = loss + masked_cross_entropy(remembered, old.labels, set(range(10)))
        memory.add(new.images, new.labels, new.tasks)
        return loss

    batches = watch(learner)
    learner.train(experiences[:3])
    retrace([*batches.states, learner.model.state_dict()], batches, loss_of)
    assert allowed[5] == set(range(2, 10))
    assert allowed[10] == set(range(4, 10))


def test_the_first_experience_is_plain_training_without_replay(build: Any, experiences: list[Any]) -> None:
    ours, plain = build("er_ace"), build("naive")
    for learner in (ours, plain):
        learner.train(experiences[0])
    assert all(map(torch.equal, ours.model.parameters(), plain.model.parameters()))
    assert len(ours.buffer) == 40
    ours.train(experiences[1])
    plain.train(experiences[1])
    assert not all(map(torch.equal, ours.model.parameters(), plain.model.parameters()))


def test_a_batch_without_one_of_its_experiences_classes_leaves_that_class_alone(
    build: Any, experiences: list[Any]
) -> None:
    learner = build("er_ace")
    learner.train(experiences[0])
    learner.source, learner.buffer.draw = experiences[1].dataset.source, lambda count: only_new(count)
    images, _ = learner.source.train.batch(torch.arange(8))

    def only_new(count: int) -> Samples:
        return Samples(images[:count], torch.full((count,), 3), torch.ones(count, dtype=torch.int64))

    def gradient(label: int) -> Tensor:
        """What the new samples of one class do to the biases of the output, replay taken away."""
        with torch.no_grad():
            learner.model.fc3.weight.zero_()
            learner.model.fc3.bias.zero_()
        for group in learner.optimizer.param_groups:
            group["lr"] = 0.0
        learner.observe(Samples(images, torch.full((8,), label), torch.ones(8, dtype=torch.int64)))
        memory = torch.full((10,), 0.1)
        memory[3] -= 1
        return learner.model.fc3.bias.grad - memory

    first = gradient(2)
    expected = torch.tensor([0, 0, 1 / 8 - 1] + [1 / 8] * 7)  # 0 and 1 are old: absent and seen
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    second = gradient(3)  # now 2 has been seen, and is not in the batch
    torch.testing.assert_close(second, torch.tensor([0, 0, 0, 1 / 7 - 1] + [1 / 7] * 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "same"), [("group_norm", True), ("batch_norm", False)])
def test_passes_are_a_difference_where_samples_of_a_batch_are_coupled(
    norm: str, same: bool, build: Any, experiences: list[Any]
) -> None:
    losses: dict[str, float] = {}
    for passes in ("joint", "separate"):
        learner = build("er_ace", norm, passes=passes, task_free=True)
        learner.train(experiences[0])
        losses[passes] = float(learner.tally.loss_sum)
    assert math.isclose(losses["joint"], losses["separate"], rel_tol=1e-5) == same


def test_statistics_are_updated_once_by_a_joint_pass_and_twice_by_separate_ones(
    build: Any, experiences: list[Any]
) -> None:
    counts = {}
    for passes in ("joint", "separate"):
        learner = build("er_ace", passes=passes)
        learner.train(experiences[:2])
        counts[passes] = int(learner.model.norm1.num_batches_tracked)
    assert counts == {"joint": 10, "separate": 15}


def test_task_free_is_true_or_false(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"learner\.task_free must be true or false; got 'yes'"):
        build("er_ace", task_free="yes")
