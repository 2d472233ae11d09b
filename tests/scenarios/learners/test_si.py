"""Synaptic intelligence: the path integral and the penalty in plain PyTorch, and the importances of Avalanche's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.training.plugins import SynapticIntelligencePlugin
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.optim.clip_norm import ClipNorm


def vector(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Path:
    """Adds up, for every parameter, minus the gradient of the cross-entropy times the step that was made."""

    def __init__(self, learner: Any, bare: Any, norm: str) -> None:
        self.model, _ = bare(norm)
        self.total = torch.zeros_like(vector(self.model.parameters()))
        self.gradients: list[Tensor] = []
        observe = type(learner).observe

        def and_note(new: Any) -> Tensor:
            before = {key: value.clone() for key, value in learner.model.state_dict().items()}
            start = vector(learner.model.parameters())
            logits = observe(learner, new)
            self.model.load_state_dict(before)
            loss = nn.functional.cross_entropy(self.model.train()(pixels(new.images)), new.labels)
            gradient = vector(torch.autograd.grad(loss, list(self.model.parameters()), materialize_grads=True))
            self.total -= gradient * (vector(learner.model.parameters()) - start)
            self.gradients.append(gradient)
            return logits

        learner.observe = and_note


@pytest.mark.few(1)
@pytest.mark.parametrize("norm", ["batch_norm", "none"])
def test_importances_are_the_papers_over_several_experiences(
    norm: str, build: Any, bare: Any, experiences: Any
) -> None:
    settings: dict[str, Any] = {"train_epochs": 2, "strength": 0.5, "damping": 0.02, "momentum": 0.9}
    learner = build("si", norm, **settings, adjust=[])
    clip = ClipNorm(learner.model.parameters(), 0.5)  # what the optimizer is given, and not the gradient of the path
    learner.step.adjust = (learner.step.adjust[0], clip, *learner.step.adjust[1:])
    start, importance = vector(learner.model.parameters()), 0.0
    for number in range(3):
        path = Path(learner, bare, norm)
        learner.train(experiences[number])
        torch.testing.assert_close(learner.path, torch.zeros_like(learner.path))
        end = vector(learner.model.parameters())
        importance = (importance + path.total / ((end - start) ** 2 + 0.02)).clamp(min=0)  # type: ignore[union-attr]
        torch.testing.assert_close(learner.importance, importance, rtol=2e-3, atol=1e-5 * float(importance.max()))
        assert torch.equal(learner.centre, end)
        start = end
        assert max(float(g.norm()) for g in path.gradients) > 0.5
    assert float(importance.max()) > 1e-3
    assert float((importance == 0).double().mean()) > 0.01  # some ways went up, and are cut at 0


def test_a_step_descends_on_both_terms(build: Any, watch: Any, retrace: Any, experiences: list[Any]) -> None:
    learner = build("si", strength=20.0, damping=0.01)
    learner.train(experiences[0])
    centre, importance = learner.centre.clone(), learner.importance.clone()
    batches = watch(learner)
    learner.train(experiences[1])

    def loss_of(model: nn.Module, new: Any) -> Tensor:
        logits = model(pixels(new.images))
        w = torch.cat([parameter.flatten() for parameter in model.parameters()])
        penalty = 20.0 * (importance * (w - centre) ** 2).sum()
        return -logits.log_softmax(1)[torch.arange(len(new)), new.labels].mean() + penalty

    retrace([*batches.states, learner.model.state_dict()], batches, loss_of)
    moved = vector(learner.model.parameters()) - centre
    assert float(20 * (importance * moved**2).sum()) > 1e-4


def copies(model: nn.Module, target: Any, excluded_parameters: Any) -> None:
    """Avalanche's own are views of the weights on the CPU, so that it never sees a step."""
    del excluded_parameters
    for name, parameter in model.named_parameters():
        target[name].data = parameter.detach().flatten().clone()


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # Avalanche squares tensors with NumPy
@pytest.mark.parametrize("norm", ["none", "group_norm"])
def test_after_one_experience_importances_are_avalanches(
    norm: str, build: Any, experiences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SynapticIntelligencePlugin, "extract_weights", staticmethod(copies))
    plugin = SynapticIntelligencePlugin(si_lambda=1.0, eps=5.0)
    learner = build("si", norm, damping=5.0, plugins=[plugin], momentum=0.9)
    learner.train(experiences[0])
    # Theirs are by name, cut at 0.001 from above and not from below.
    theirs = torch.cat([plugin.ewc_data[1][name].data for name, _ in learner.model.named_parameters()])
    torch.testing.assert_close(theirs.clamp(min=0), learner.importance.clamp(max=0.001), rtol=1e-3, atol=1e-7)
    assert float((learner.importance < 0.001).double().mean()) > 0.5
    assert float(learner.importance.max()) > 1e-4
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(plugin.ewc_data[0][name].data, parameter.detach().flatten())


def test_the_first_experience_is_plain_training(build: Any, experiences: list[Any]) -> None:
    ours, plain = build("si"), build("naive")
    for learner in (ours, plain):
        learner.train(experiences[0])
    assert all(map(torch.equal, ours.model.parameters(), plain.model.parameters()))


def test_options_are_positive(build: Any) -> None:
    for option in ("strength", "damping"):
        with pytest.raises(ConfigError, match=f"learner.{option} must be greater than 0; got 0"):
            build("si", **{option: 0})
