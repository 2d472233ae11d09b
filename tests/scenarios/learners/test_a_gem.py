"""A-GEM: each step in plain PyTorch, and the projection against Avalanche's plugin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.training.plugins import AGEMPlugin
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError


def gradient_of(model: nn.Module, samples: Any) -> Tensor:
    loss = nn.functional.cross_entropy(model(pixels(samples.images)), samples.labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients]).double()


@pytest.mark.few(1)
@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_each_step_is_the_papers(norm: str, build: Any, bare: Any, watch: Any, experiences: list[Any]) -> None:
    learner = build("a_gem", norm, memory_size=30, memory_batch=12)
    drawn: list[Any] = []
    draw = learner.buffer.draw

    def draw_and_keep(count: int) -> Any:
        assert count == 12
        drawn.append(draw(count))
        return drawn[-1]

    learner.buffer.draw = draw_and_keep
    batches = watch(learner)
    learner.train(experiences[:3])
    states = [*batches.states, learner.model.state_dict()]
    model, optimizer = bare(norm)
    projected = 0
    for step, new in enumerate(batches):
        model.load_state_dict(states[step])
        old = None
        if step >= 5:
            old = gradient_of(model, drawn[step - 5])  # in training mode, and first
        gradient = gradient_of(model, new)
        if old is not None and float(gradient @ old) < 0:
            gradient -= (gradient @ old) / (old @ old) * old
            assert abs(float(gradient @ old)) < 1e-9
            projected += 1
        place = 0
        for parameter in model.parameters():
            parameter.grad = gradient[place : place + parameter.numel()].view_as(parameter).float()
            place += parameter.numel()
        optimizer.step()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(states[step + 1][key], value, rtol=1e-4, atol=2e-6)
    assert len(drawn) == 10
    assert projected


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_projection_is_avalanches(sign: float, build: Any) -> None:
    ours = build("a_gem")
    torch.manual_seed(0)
    reference = [torch.randn_like(p) for p in ours.model.parameters()]
    gradients = [torch.randn_like(p) + sign * r for p, r in zip(ours.model.parameters(), reference, strict=True)]
    for parameter, gradient in zip(ours.model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    plugin = AGEMPlugin(patterns_per_experience=1, sample_size=1)
    plugin.buffers = [None]  # type: ignore[list-item]
    plugin.reference_gradients = torch.cat([r.flatten() for r in reference])
    twin = build("a_gem").model
    for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    plugin.after_backward(SimpleNamespace(model=twin, device="cpu"))
    ours._reference = reference
    ours._project()
    for one, other, before in zip(ours.model.parameters(), twin.parameters(), gradients, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.grad, before) is (sign > 0)


def test_the_memory_is_of_experiences_that_have_ended_as_many_of_each_class(build: Any, experiences: list[Any]) -> None:
    learner = build("a_gem", memory_size=12)
    for number in range(3):
        learner.train(experiences[number])
        memory = learner.buffer.everything()
        counts = memory.labels.bincount(minlength=10).tolist()
        assert counts == [12 // (2 * number + 2)] * (2 * number + 2) + [0] * (8 - 2 * number)
        assert torch.equal(memory.tasks, memory.labels // 2)


def test_the_first_experience_is_plain_training(build: Any, experiences: list[Any]) -> None:
    ours, plain = build("a_gem"), build("naive")
    for learner in (ours, plain):
        learner.train(experiences[0])
    assert all(map(torch.equal, ours.model.parameters(), plain.model.parameters()))


@pytest.mark.few(2)
@pytest.mark.parametrize("norm", ["nap", "unified_norm", "adab2n"])
def test_penalties_and_hooks_of_a_norm_go_with_it(norm: str, build: Any, experiences: list[Any]) -> None:
    learner = build("a_gem", norm, memory_size=20)
    learner.train(experiences[:2])
    assert not learner.step._penalties


def test_options_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"learner.memory_size must be an integer of 1 or more"):
        build("a_gem", memory_size=0)
    with pytest.raises(ConfigError, match=r"learner.memory_batch is 1: a pass over a single image"):
        build("a_gem", memory_batch=1)
    build("a_gem", "group_norm", memory_batch=1)
