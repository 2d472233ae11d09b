"""Experience replay against plain PyTorch, and the controls of a memory's statistics that replay learners share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.streams.buffer import ReservoirBuffer, Samples
from fednorm.streams.stream import Stream


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every sample, shape (n,)."""
    return logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]


def buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


@pytest.mark.few(2)
@pytest.mark.parametrize("memory_batch", [0, 5])
@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_it_learns_from_new_and_memory_samples_alike(
    passes: str, memory_batch: int, build: Any, watch: Any, retrace: Any, experiences: list[Any]
) -> None:
    learner = build("er", passes=passes, memory_batch=memory_batch, memory_size=30)
    memory = ReservoirBuffer(30, num_classes=10, seed=5)

    def loss_of(model: nn.Module, new: Samples) -> Tensor:
        images, labels, sizes = pixels(new.images), new.labels, [len(new)]
        if len(memory):
            old = memory.draw(memory_batch or len(new))
            images, labels = torch.cat([images, pixels(old.images)]), torch.cat([labels, old.labels])
            sizes.append(len(old))
        memory.add(new.images, new.labels, new.tasks)
        parts = [images] if passes == "joint" else images.split(sizes)
        return cross_entropy(torch.cat([model(part) for part in parts]), labels).mean()

    batches = watch(learner)
    learner.train(experiences[:2])
    retrace([*batches.states, learner.model.state_dict()], batches, loss_of)
    for held, expected in zip(
        vars(learner.buffer.everything()).values(), vars(memory.everything()).values(), strict=True
    ):
        assert held is expected is None or torch.equal(held, expected)


def test_the_memory_holds_images_without_augmentation(build: Any, stream: Stream, experiences: list[Any]) -> None:
    learner = build("er", augment="crop_flip")
    given: list[Tensor] = []
    learner.model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    learner.train(experiences[0])
    raw = {image.numpy().tobytes() for image in stream.experiences[0].train.batch(torch.arange(40))[0]}
    held = [image.numpy().tobytes() for image in learner.buffer.everything().images]
    assert len(held) == 40
    assert set(held) == raw
    seen = torch.cat(given).add(1).mul(127.5).round().to(torch.uint8)
    assert sum(image.contiguous().numpy().tobytes() in raw for image in seen) < 10


def test_with_balanced_statistics_only_balanced_draws_move_them(
    build: Any, bare: Any, watch: Any, experiences: list[Any]
) -> None:
    learner = build("er", statistics="balanced", memory_size=30)
    batches = watch(learner)
    learner.train(experiences[:2])
    model, optimizer = bare()
    memory = ReservoirBuffer(30, num_classes=10, seed=5)
    for new, state in zip(batches, batches.states, strict=True):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=2e-6)
        model.load_state_dict(state)
        groups = [new, memory.draw(len(new))] if len(memory) else [new]
        before = [buffer.clone() for buffer in model.buffers()]
        logits = model(torch.cat([pixels(group.images) for group in groups]))
        loss = cross_entropy(logits, torch.cat([group.labels for group in groups])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        if len(memory):
            with torch.no_grad():
                model(pixels(memory.draw_balanced(2 * len(new)).images))
        memory.add(new.images, new.labels, new.tasks)


def test_recalibration_is_for_the_evaluation_only(build: Any, experiences: list[Any]) -> None:
    learner = build("er", recalibrate=True, eval_mb_size=64)
    learner.train(experiences[0])
    before = [buffer.clone() for buffer in buffers(learner.model)]
    memory = pixels(learner.buffer.everything().images)
    with learner.for_evaluation() as model:
        assert not model.training
        maps = model.conv1(memory).transpose(0, 1).flatten(1)
        torch.testing.assert_close(model.norm1.running_mean, maps.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.norm1.running_var, maps.var(1), rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, buffers(learner.model), before))


def test_what_cannot_work_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match="memory_size is 0, and this learner replays"):
        build("er", memory_size=0)
    with pytest.raises(ConfigError, match="cannot hold a sample of each of the 10 classes"):
        build("er", memory_size=9)
    with pytest.raises(ConfigError, match=r"statistics = balanced .* this network has none"):
        build("er", "group_norm", statistics="balanced")
    for option, value in (("memory_batch", -1), ("passes", "two"), ("statistics", "none"), ("recalibrate", 1)):
        with pytest.raises(ConfigError, match=f"learner.{option} must be"):
            build("er", **{option: value})


@pytest.mark.parametrize(("batch", "memory", "ratio"), [(8, 0, 1), (8, 4, 2), (8, 3, 0), (8, 16, 0)])
def test_the_ratio_of_new_to_memory_samples(batch: int, memory: int, ratio: int, build: Any) -> None:
    assert build("er", memory_batch=memory).options.batch_ratio(batch) == ratio
    assert build("er", memory_batch=memory, passes="separate").options.batch_ratio(batch) == 0


def test_samples_are_drawn_anew_at_every_step(build: Any, experiences: list[Any]) -> None:
    learner = build("er", memory_size=30)
    drawn: list[Samples] = []
    draw = learner.buffer.draw
    learner.buffer.draw = lambda count: (drawn.append(draw(count)), drawn[-1])[1]
    learner.train(experiences[0])
    assert [len(samples) for samples in drawn] == [8] * 4
    assert not torch.equal(drawn[2].images, drawn[3].images)
