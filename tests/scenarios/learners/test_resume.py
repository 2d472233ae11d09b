"""A learner that is stopped in the middle of an experience, and goes on elsewhere, ends where it would have ended."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fednorm.avalanche.benchmark import joint_to_avalanche
from fednorm.cards import LEARNERS
from fednorm.streams.stream import Stream

OPTIONS: dict[str, dict[str, Any]] = {
    "er": {"memory_size": 30},
    "er_ace": {"memory_size": 30},
    "derpp": {"memory_size": 30},
    "ewc": {"fisher_samples": 5},
    "gdumb": {"memory_size": 30, "memory_epochs": 2},
    "a_gem": {"memory_size": 30},
    "mir": {"memory_size": 30, "candidates": 12},
    "icarl": {"memory_size": 30},
    "scr": {"memory_size": 30, "projection": 8},
}


class KilledError(Exception):
    """Stands for the end of the process."""


class Kill:
    """An Avalanche plugin: keeps a checkpoint after a step, and ends the process at some later moment."""

    def __init__(self, step: int, at: str) -> None:
        self.step, self.at, self.checkpoint = step, at, (b"", "")

    def after_training_iteration(self, strategy: Any) -> None:
        if strategy.progress.step == self.step:
            tensors = {key: tensor.clone() for key, tensor in strategy.tensors().items()}
            self.checkpoint = save(tensors), json.dumps(strategy.state())
            if self.at == "step":
                raise KilledError

    def before_update(self, _: Any) -> None:
        if self.at == "later" and self.checkpoint[0]:
            raise KilledError


def finish(learner: Any, experiences: list[Any]) -> list[dict[str, torch.Tensor]]:
    """Train to the stream's end; return all tensors as they were after each experience that ended here."""
    ends = []
    for experience in experiences[learner.progress.ended :]:
        learner.train(experience)
        assert learner.progress.batch == learner.progress.epoch == 0
        counts = {"seen": torch.tensor(learner.tally.seen), "met": torch.tensor(learner.met)}
        ends.append({key: tensor.clone() for key, tensor in (learner.tensors() | counts).items()})
    return ends


# 5 steps an epoch, 10 an experience: within the first epoch of the second experience, within its second epoch, at its
# last step, where what happens at an experience's end is still to come, and the same with the end already under way.
@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "at"), [(12, "step"), (17, "step"), (20, "step"), (20, "later")])
@pytest.mark.parametrize("norm", ["batch_norm", "adab2n"])
@pytest.mark.parametrize("name", LEARNERS.names)
def test_it_goes_on_bit_for_bit(
    name: str, norm: str, step: int, at: str, build: Any, stream: Stream, experiences: list[Any]
) -> None:
    tasks = list(joint_to_avalanche(stream).train_stream) if name == "joint" else experiences[:3]
    settings = {"train_epochs": 2, "augment": "crop_flip", "momentum": 0.9, **OPTIONS.get(name, {})}
    uninterrupted = build(name, norm, **settings)
    expected = finish(uninterrupted, tasks)

    kill = Kill(step, at)
    killed = build(name, norm, plugins=[kill], **settings)
    with pytest.raises(KilledError):
        killed.train(tasks)

    resumed = build(name, norm, **settings)
    resumed.load(load(kill.checkpoint[0]), json.loads(kill.checkpoint[1]))
    assert resumed.progress.step == step
    found = finish(resumed, tasks)
    assert resumed.state() == uninterrupted.state()
    assert len(found) == (1 if name == "joint" else 2)
    for ours, theirs in zip(found, expected[-len(found) :], strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])] == []


def test_a_checkpoint_that_lacks_something_ends_elsewhere(build: Any, experiences: list[Any]) -> None:
    """The test above would see it."""
    expected = finish(build("er_ace", memory_size=30), experiences[:3])
    kill = Kill(7, "step")
    with pytest.raises(KilledError):
        build("er_ace", plugins=[kill], memory_size=30).train(experiences[:3])
    tensors = load(kill.checkpoint[0])
    tensors["own/buffer/draw"] = torch.Generator().manual_seed(0).get_state()
    resumed = build("er_ace", memory_size=30)
    resumed.load(tensors, json.loads(kill.checkpoint[1]))
    found = finish(resumed, experiences[:3])
    assert not torch.equal(found[-1]["model/conv1.weight"], expected[-1]["model/conv1.weight"])
