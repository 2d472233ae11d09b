"""MIR: which samples are replayed, by a network that takes the step; and the loss of each step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from avalanche.training.plugins.mir import update_temp
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError


@pytest.mark.few(2)
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm", "adab2n"])
def test_the_interference_is_that_of_a_network_that_takes_the_step(
    norm: str, build: Any, experiences: list[Any]
) -> None:
    learner = build("mir", norm, memory_size=40)
    learner.train(experiences[:2])
    new, candidates = learner.buffer.draw(7), learner.buffer.draw(20)
    before = {key: value.clone() for key, value in learner.model.state_dict().items()}
    found = learner.interference(new, candidates)
    assert all(module.training for module in learner.model.modules())
    assert all(torch.equal(value, before[key]) for key, value in learner.model.state_dict().items())

    twin = copy.deepcopy(learner.model).eval()
    loss = nn.functional.cross_entropy(twin(pixels(new.images)), new.labels)
    moved = update_temp(twin, torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True), 0.05)

    def losses(model: nn.Module) -> Tensor:
        log_p = model(pixels(candidates.images)).detach().double().log_softmax(1)
        return -log_p[torch.arange(20), candidates.labels]

    torch.testing.assert_close(found.detach().double(), losses(moved) - losses(twin), rtol=1e-3, atol=1e-5)
    assert float(found.abs().max()) > 1e-3


def test_those_that_would_suffer_most_are_replayed(build: Any, experiences: list[Any]) -> None:
    learner = build("mir", "group_norm", memory_size=40, candidates=25, memory_batch=6)
    learner.train(experiences[:2])
    state = learner.buffer.state_dict()
    candidates = learner.buffer.draw(25)
    learner.buffer.load_state_dict(state)
    new = candidates  # whatever
    scores = learner.interference(new, candidates)
    chosen = learner.remembered(new)
    wanted = sorted(range(25), key=lambda i: -float(scores[i]))[:6]
    assert torch.equal(chosen.images, candidates.images[wanted])
    assert chosen.labels.tolist() == candidates.labels[wanted].tolist()
    assert chosen.tasks.tolist() == candidates.tasks[wanted].tolist()


@pytest.mark.few(1)
@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_each_step_adds_both_means(
    passes: str, build: Any, watch: Any, retrace: Any, experiences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = build("mir", memory_size=30, candidates=12, memory_batch=5, passes=passes)
    chosen: list[Any] = []
    remembered = learner.remembered

    def keep(new: Any) -> Any:
        chosen.append(remembered(new))
        return chosen[-1]

    monkeypatch.setattr(learner, "remembered", keep)
    batches = watch(learner)
    learner.train(experiences[:2])
    steps = iter(range(len(batches)))

    def loss_of(model: nn.Module, new: Any) -> Tensor:
        step = next(steps)
        groups = [new, chosen[step - 1]] if step else [new]
        if passes == "joint":
            logits = model(torch.cat([pixels(group.images) for group in groups])).split([len(g) for g in groups])
        else:
            logits = [model(pixels(group.images)) for group in groups]
        terms = [nn.functional.cross_entropy(z, group.labels) for z, group in zip(logits, groups, strict=True)]
        return sum(terms)  # type: ignore[return-value]

    retrace([*batches.states, learner.model.state_dict()], batches, loss_of)
    assert [len(each) for each in chosen] == [5] * 9


def test_options_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"learner.candidates must be an integer of 1 or more"):
        build("mir", candidates=0)
    with pytest.raises(ConfigError, match=r"learner.memory_size is 0"):
        build("mir", memory_size=0)
