"""EWC: the Fisher information in closed form and by a loop; the penalty as the sum over experiences it stands for."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from fednorm.rng import torch_seeded
from fednorm.streams.buffer import Samples


def vector(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def linear() -> nn.Sequential:
    with torch_seeded(0, "linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def at_the_end_of(learner: Any, experience: Any) -> tuple[Tensor, Tensor]:
    """Put a learner at an experience's end; return the experience's images and labels."""
    learner.source = experience.dataset.source
    images, labels = learner.source.train.batch(torch.arange(len(learner.source.train)))
    return pixels(images), labels


def fisher_by_a_loop(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples of the squared gradient of log p(label | image), one backward pass a sample."""
    twin = copy.deepcopy(model).eval()
    total = torch.zeros_like(vector(twin))
    for image, label in zip(images, labels.tolist(), strict=True):
        twin.zero_grad()
        twin(image[None]).log_softmax(1)[0, label].backward()
        total += (
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in twin.parameters()]) ** 2
        )
    return total / len(images)


# The Fisher information -----------------------------------------------------------------------------------------------


def test_the_empirical_one_of_a_linear_softmax_in_closed_form(build: Any, experiences: list[Any]) -> None:
    learner = build("ewc", model=linear(), labels="data", fisher_samples=0)
    images, labels = at_the_end_of(learner, experiences[0])
    x, p = images.flatten(1).double(), learner.model(images).detach().double().softmax(1)
    squares = (nn.functional.one_hot(labels, 10) - p) ** 2
    expected = torch.cat([(squares.T @ x**2).flatten() / len(x), squares.mean(0)])
    torch.testing.assert_close(learner.fisher().double(), expected, rtol=1e-4, atol=1e-7)


def test_the_models_labels_are_drawn_from_the_model(build: Any, experiences: list[Any]) -> None:
    model = linear()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0] * 5 + [40.0, 40.0] + [0.0] * 3))
    own, given = (build("ewc", model=model, labels=labels) for labels in ("model", "data"))
    for learner in (own, given):
        at_the_end_of(learner, experiences[0])
    # Labels 5 and 6 have probability 1/2 each; whichever is drawn, (1[y = k] - p_k)^2 is 1/4 for both.
    expected = torch.tensor([0.0] * 5 + [0.25, 0.25] + [0.0] * 3)
    torch.testing.assert_close(own.fisher()[-10:], expected, rtol=1e-4, atol=1e-9)
    # The given labels are 0 and 1.
    assert float(given.fisher()[-10:-8].sum()) == pytest.approx(1.0)


def test_the_models_labels_are_drawn_as_often_as_the_model_expects(build: Any, experiences: list[Any]) -> None:
    model = linear()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.9, 0.1] + [1e-9] * 8).log())
    learner = build("ewc", model=model)
    squares = []
    for experience in experiences * 4:
        at_the_end_of(learner, experience)
        squares.append(float(learner.fisher()[-9]))
        learner.progress.ended += 1
    # Of 800 draws a share of 0.1 is label 1: mean of (1[y = 1] - 0.1)^2 = 0.1 * 0.81 + 0.9 * 0.01, and 4 sigma.
    assert sum(squares) / len(squares) == pytest.approx(0.09, abs=4 * 0.8 * (0.09 / 800) ** 0.5)
    assert len(set(squares)) > 5


@pytest.mark.few(1)
@pytest.mark.parametrize("norm", ["batch_norm", "adab2n", "group_norm", "sws"])
def test_it_is_the_mean_of_squared_gradients_of_single_samples_in_evaluation_mode(
    norm: str, build: Any, experiences: list[Any]
) -> None:
    learner = build("ewc", norm, labels="data", fisher_samples=0)
    learner.train(experiences[0])
    images, labels = at_the_end_of(learner, experiences[1])
    before = {key: value.clone() for key, value in learner.model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in learner.model.parameters()]
    fisher = learner.fisher()
    torch.testing.assert_close(fisher, fisher_by_a_loop(learner.model, images, labels), rtol=1e-3, atol=1e-8)
    assert float(fisher.max()) > 1e-3
    # Neither the statistics nor the gradients nor the mode of the model are touched.
    assert all(torch.equal(value, before[key]) for key, value in learner.model.state_dict().items())
    assert all(p.grad is g is None or torch.equal(p.grad, g)
               for p, g in zip(learner.model.parameters(), gradients, strict=True))  # fmt: skip
    assert all(module.training for module in learner.model.modules())


def test_at_most_so_many_samples_are_taken_and_others_each_time(
    build: Any, experiences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = build("ewc", model=linear(), labels="data", fisher_samples=7)
    images, labels = at_the_end_of(learner, experiences[0])
    each = torch.stack([fisher_by_a_loop(learner.model, images[i : i + 1], labels[i : i + 1]) for i in range(40)])
    chosen = []
    for ended in range(2):
        monkeypatch.setattr(learner.progress, "ended", ended)
        fisher = learner.fisher()
        # Which seven: the solution of fisher = mean of seven rows, among 0/1 weights.
        weights = torch.linalg.lstsq(each.T.double(), 7 * fisher.double()[:, None]).solution[:, 0]
        torch.testing.assert_close(weights, weights.round(), atol=1e-2, rtol=0)
        chosen.append(set(weights.round().nonzero().flatten().tolist()))
    assert [len(rows) for rows in chosen] == [7, 7]
    assert chosen[0] != chosen[1]


# The penalty ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize(("mode", "gamma"), [("separate", 1.0), ("online", 1.0), ("online", 0.6)])
def test_the_penalty_is_the_papers_sum(mode: str, gamma: float, build: Any, experiences: list[Any]) -> None:
    learner = build("ewc", strength=3.0, mode=mode, gamma=gamma, fisher_samples=10)
    ends: list[tuple[Tensor, Tensor]] = []
    for number in range(4):
        learner.train(experiences[number])
        at_the_end_of(learner, experiences[number])
        learner.progress.ended -= 1
        ends.append((learner.fisher().double(), vector(learner.model).double()))
        learner.progress.ended += 1
    with torch_seeded(0, "away"), torch.no_grad():
        for parameter in learner.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    w = vector(learner.model).double().requires_grad_()
    if mode == "separate":
        expected = sum(3.0 / 2 * (fisher * (w - end) ** 2).sum() for fisher, end in ends)
    else:
        fisher = sum(gamma ** (3 - number) * fisher for number, (fisher, _) in enumerate(ends))
        expected = 3.0 / 2 * (fisher * (w - ends[-1][1]) ** 2).sum()
    penalty = learner.penalty()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(expected, w)
    ours = torch.autograd.grad(penalty, learner.trained)
    torch.testing.assert_close(torch.cat([g.flatten() for g in ours]).double(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("norm", ["batch_norm", "adab2n"])
def test_a_step_descends_on_both_terms(
    norm: str, build: Any, bare: Any, watch: Any, retrace: Any, experiences: list[Any]
) -> None:
    learner = build("ewc", norm, strength=5.0, labels="data", fisher_samples=0)
    batches = watch(learner)
    learner.train(experiences[:3])
    ties: list[tuple[Tensor, Tensor]] = []
    steps = itertools.count()
    end, _ = bare(norm)

    def loss_of(model: nn.Module, new: Samples) -> Tensor:
        number, first = divmod(next(steps), 5)
        if number and not first:
            end.load_state_dict(batches.states[5 * number])
            ties.append((fisher_by_a_loop(end, *at_the_end_of(learner, experiences[number - 1])), vector(end)))
        layers = [module for module in model.modules() if hasattr(module, "set_tasks")]
        for layer in layers:
            layer.set_tasks(new.tasks, number + 1)
        logits = model(pixels(new.images))
        loss = -logits.log_softmax(1)[torch.arange(len(new)), new.labels].mean()
        loss = loss + sum(term for layer in layers if (term := layer.penalty()) is not None)
        w = torch.cat([parameter.flatten() for parameter in model.parameters()])
        return loss + sum(5.0 / 2 * (fisher * (w - tied) ** 2).sum() for fisher, tied in ties)

    retrace([*batches.states, learner.model.state_dict()], batches, loss_of, norm=norm)
    assert len(ties) == 2


def test_the_first_experience_is_plain_training(build: Any, experiences: list[Any]) -> None:
    ours, plain = build("ewc"), build("naive")
    for learner in (ours, plain):
        learner.train(experiences[0])
    assert all(map(torch.equal, ours.model.parameters(), plain.model.parameters()))


def test_it_remembers_as_much_after_many_experiences_as_after_one(build: Any, experiences: list[Any]) -> None:
    learner = build("ewc", fisher_samples=3)
    sizes = []
    for experience in experiences[:3]:
        learner.train(experience)
        sizes.append(sum(tensor.numel() for tensor in learner.own_tensors().values()))
    assert sizes == [2 * len(vector(learner.model)) + 1] * 3


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("strength", 0, "must be greater than 0; got 0"),
        ("mode", "both", "must be one of separate, online; got 'both'"),
        ("gamma", 0.0, "must be greater than 0 and at most 1; got 0.0"),
        ("gamma", 1.5, "must be greater than 0 and at most 1; got 1.5"),
        ("labels", "true", "must be one of model, data; got 'true'"),
        ("fisher_samples", -1, "must be an integer of 0 or more; got -1"),
    ],
)
def test_options_out_of_range(option: str, value: Any, expected: str, build: Any) -> None:
    with pytest.raises(ConfigError, match=f"learner.{option} {expected}"):
        build("ewc", **{option: value})
