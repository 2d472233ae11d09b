"""Joint training sees all tasks, mixed, and is otherwise naive."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fednorm.avalanche.benchmark import joint_to_avalanche
from fednorm.errors import ConfigError
from fednorm.streams.stream import Stream
from scenarios.learners import joint, naive


def test_it_sees_every_image_of_every_experience_mixed(build: Any, watch: Any, stream: Stream) -> None:
    learner = build("joint", "adab2n")
    (experience,) = joint_to_avalanche(stream).train_stream
    batches = watch(learner)
    learner.train(experience)
    expected: Counter[tuple[bytes, int, int]] = Counter()
    for source in stream:
        images, labels = source.train.batch(torch.arange(len(source.train)))
        expected.update((i.numpy().tobytes(), y, source.number) for i, y in zip(images, labels.tolist(), strict=True))
    came = Counter(
        (image.numpy().tobytes(), label, task)
        for batch in batches
        for image, label, task in zip(batch.images, batch.labels.tolist(), batch.tasks.tolist(), strict=True)
    )
    assert came == expected
    assert len(batches) == 25
    assert min(len(batch.tasks.unique()) for batch in batches) > 1


def test_the_norm_is_told_that_all_tasks_have_been_seen(build: Any, stream: Stream) -> None:
    learner = build("joint", "adab2n")
    told: list[tuple[int, int]] = []
    layer = learner.step.hooked[0]
    set_tasks = layer.set_tasks
    layer.set_tasks = lambda tasks, count: (told.append((len(tasks), count)), set_tasks(tasks, count))[1]
    learner.train(joint_to_avalanche(stream).train_stream)
    assert told == [(8, 5)] * 25


def test_only_joint_is_given_everything() -> None:
    assert joint.SPEC.joint
    assert not naive.SPEC.joint
    assert joint.Joint.observe is naive.Naive.observe


def test_what_has_no_union_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be learned jointly"):
        joint_to_avalanche(make("random_labels", num_experiences=2, train_per_experience=20))
