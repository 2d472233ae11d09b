"""LwF against its formula, and against Avalanche's where the two are the same."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from avalanche.training import Naive as AvalancheNaive
from avalanche.training.plugins import LwFPlugin
from avalanche.training.regularization import LearningWithoutForgetting
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.streams.buffer import Samples


class InOurOrder(AvalancheNaive):
    """Avalanche's training loop, its loader replaced by batches that a learner of ours was given."""

    batches: list[Samples]

    def make_train_dataloader(self, **_: Any) -> None:
        self.dataloader = [[pixels(b.images), b.labels, torch.zeros_like(b.labels)] for b in self.batches]


def divergence(logits: Tensor, taught: Tensor, old: list[int], temperature: float) -> Tensor:
    """The mean over samples of sum_k q_k log(q_k / p_k), tempered as in the paper: y^(1/T) / sum y^(1/T)."""
    total = logits.new_zeros(())
    for own, wanted in zip(logits.softmax(1), taught.softmax(1), strict=True):
        p = torch.stack([own[k] ** (1 / temperature) for k in old])
        q = torch.stack([wanted[k] ** (1 / temperature) for k in old])
        p, q = p / p.sum(), q / q.sum()
        total = total + (q * (q / p).log()).sum()
    return total / len(logits)


@pytest.mark.few(2)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
def test_the_loss_is_the_papers_with_a_teacher_in_evaluation_mode(
    norm: str, temperature: float, build: Any, bare: Any, watch: Any, retrace: Any, experiences: list[Any]
) -> None:
    learner = build("lwf", norm, alpha=1.5, temperature=temperature)
    batches = watch(learner)
    learner.train(experiences[:3])
    steps = itertools.count()
    teacher, _ = bare(norm)

    def loss_of(model: nn.Module, new: Samples) -> Tensor:
        images, step = pixels(new.images), next(steps)
        logits = model(images)
        loss = -logits.log_softmax(1)[torch.arange(len(new)), new.labels].mean()
        if step < 5:
            return loss
        # Five steps an experience: the network that the last one left.
        teacher.load_state_dict(batches.states[step - step % 5])
        with torch.no_grad():
            taught = teacher.eval()(images)
        return loss + 1.5 * divergence(logits, taught, list(range(2 * (step // 5))), temperature)

    retrace([*batches.states, learner.model.state_dict()], batches, loss_of, norm=norm)


@pytest.mark.filterwarnings("ignore:No loggers specified")
def test_without_statistics_and_dropout_it_is_avalanches(
    build: Any, bare: Any, watch: Any, experiences: list[Any]
) -> None:
    learner = build("lwf", "group_norm", alpha=2.0, temperature=2.0)
    model, optimizer = bare("group_norm")
    plugin = LwFPlugin(alpha=2.0, temperature=2.0)

    def remember(_: Any, experience: Any) -> None:
        # As Avalanche's, which asks a data set for its tasks; ours has none.
        plugin.lwf.prev_model = copy.deepcopy(model)
        plugin.lwf.prev_classes_by_task[0] |= set(experience.dataset.targets.uniques)

    plugin.lwf.post_adapt = remember
    avalanche = InOurOrder(
        model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), plugins=[plugin], evaluator=None
    )
    for experience in experiences[:3]:
        avalanche.batches = watch(learner)
        learner.train(experience)
        avalanche.train(experience, [])
    for key, value in learner.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=1e-5)


def test_the_distillation_is_avalanches_formula(build: Any) -> None:
    learner = build("lwf", temperature=3.0)
    learner.old_classes[[1, 4, 7]] = True
    generator = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(2, 6, 10, generator=generator) * 3
    expected = LearningWithoutForgetting(temperature=3.0)._distillation_loss(logits, taught, [1, 4, 7])
    torch.testing.assert_close(learner.distillation(logits, taught), expected)
    assert float(learner.distillation(logits, logits)) == 0


def test_classes_to_come_are_not_distilled(build: Any, experiences: list[Any]) -> None:
    learner = build("lwf")
    learner.train(experiences[:2])
    assert learner.old_classes.tolist() == [True] * 4 + [False] * 6
    logits, taught = torch.zeros(3, 10, requires_grad=True), torch.randn(3, 10)
    learner.distillation(logits, taught).backward()
    assert torch.equal(logits.grad[:, 4:], torch.zeros(3, 6))
    assert (logits.grad[:, :4] != 0).all()


def test_the_teacher_stays_what_it_was_and_is_not_trained(build: Any, experiences: list[Any]) -> None:
    learner = build("lwf", "adab2n")
    learner.train(experiences[0])
    taught = learner.teacher
    before = {key: value.clone() for key, value in taught.state_dict().items()}
    assert all(torch.equal(value, learner.model.state_dict()[key]) for key, value in before.items())
    assert not any(module.training for module in taught.modules())
    assert not any(parameter.requires_grad for parameter in taught.parameters())
    learner.train(experiences[1])
    assert all(torch.equal(value, before[key]) for key, value in taught.state_dict().items())
    assert learner.teacher is not taught
    assert learner.model.training


def test_options_are_positive(build: Any) -> None:
    for option in ("alpha", "temperature"):
        with pytest.raises(ConfigError, match=f"learner.{option} must be greater than 0; got 0"):
            build("lwf", **{option: 0})
