"""SCR: the loss against Avalanche's, each step in plain PyTorch, and the classifier."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from avalanche.models import NCMClassifier
from avalanche.training.losses import SCRLoss
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from scenarios.learners.scr import supervised_contrastive


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_the_loss_is_avalanches(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    views = nn.functional.normalize(torch.randn(9, 2, 5, generator=generator, dtype=torch.float64), dim=2)
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4])
    # Theirs is divided by a base temperature, which makes a factor of it.
    expected = SCRLoss(temperature=temperature, base_temperature=temperature)(views.float(), labels)
    ours = supervised_contrastive(torch.cat([views[:, 0], views[:, 1]]), torch.cat([labels, labels]), temperature)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("norm", ["batch_norm", "group_norm"])
def test_each_step_contrasts_two_views(
    norm: str,
    passes: str,
    build: Any,
    watch: Any,
    retrace: Any,
    experiences: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = build("scr", norm, memory_size=30, memory_batch=6, passes=passes, projection=7, temperature=0.2)
    drawn: list[Any] = []
    heads: list[nn.Module] = []
    remembered, observe = learner.remembered, learner.observe

    def keep(new: Any) -> Any:
        drawn.append(remembered(new))
        return drawn[-1]

    def note(new: Any) -> Tensor:
        heads.append(copy.deepcopy(learner.projection))
        return observe(new)

    monkeypatch.setattr(learner, "remembered", keep)
    batches = watch(learner)
    observe = learner.observe
    monkeypatch.setattr(learner, "observe", note)
    learner.train(experiences[:2])
    heads.append(learner.projection)
    steps = iter(range(len(batches)))
    projections: list[dict[str, Tensor]] = []

    def loss_of(model: Any, new: Any) -> Tensor:
        step = next(steps)
        groups = [new, new] if not step else [new, new, drawn[step - 1], drawn[step - 1]]
        kept: list[Tensor] = []
        handle = model.fc3.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        inputs = [pixels(group.images) for group in groups]
        for each in [torch.cat(inputs)] if passes == "joint" else inputs:
            model(each)
        handle.remove()
        features, labels = torch.cat(kept), torch.cat([group.labels for group in groups])
        projection = heads[step]
        z = nn.functional.normalize(projection(features), dim=1)
        total = z.new_zeros(())
        for i in range(len(z)):
            others = [a for a in range(len(z)) if a != i]
            log_total = torch.stack([z[i] @ z[a] / 0.2 for a in others]).logsumexp(0)
            own = [z[i] @ z[p] / 0.2 - log_total for p in others if labels[p] == labels[i]]
            total = total - torch.stack(own).mean() / len(z)
        gradients = torch.autograd.grad(total, list(projection.parameters()), retain_graph=True)
        named = zip(projection.named_parameters(), gradients, strict=True)
        projections.append({name: (p - 0.05 * g).detach() for (name, p), g in named})
        return total + nn.functional.cross_entropy(model.fc3(features.detach()), labels)

    retrace([*batches.states, learner.model.state_dict()], batches, loss_of, norm=norm)
    for after, expected in zip(heads[1:], projections, strict=True):
        for name, tensor in after.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    assert [len(each) for each in drawn] == [6] * 9


def test_the_second_view_is_augmented_and_the_first_is_not(build: Any, experiences: list[Any]) -> None:
    learner = build("scr", "group_norm", memory_size=30, augment="crop_flip")
    seen: list[Tensor] = []
    learner.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    kept: list[Any] = []
    observe = learner.observe
    learner.observe = lambda new: (kept.append(new), observe(new))[1]
    learner.train(experiences[0])
    for images, new in zip(seen, kept, strict=True):
        assert torch.equal(images[: len(new)], pixels(new.images))
        assert not torch.equal(images[len(new) : 2 * len(new)], pixels(new.images))


def test_it_classifies_as_avalanches_nearest_class_mean_over_the_memory(build: Any, experiences: list[Any]) -> None:
    learner = build("scr", memory_size=30, projection=8)
    learner.train(experiences[:2])
    images = torch.cat([e.dataset.source.test.batch(torch.arange(20))[0] for e in experiences[:3]])

    def features_of(pictures: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = learner.model.fc3.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
        learner.model.eval()(pixels(pictures))
        handle.remove()
        return nn.functional.normalize(kept[0], dim=1)

    memory = learner.buffer.everything()
    means = {}
    for label in memory.labels.unique().tolist():
        mean = features_of(memory.images[memory.labels == label]).mean(0)
        means[label] = mean / mean.norm()
    ncm = NCMClassifier(normalize=True)
    ncm.replace_class_means_dict(means)
    expected = ncm(features_of(images))
    before = {key: value.clone() for key, value in learner.model.state_dict().items()}
    with learner.for_evaluation() as model:
        found = model(pixels(images)).detach()
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()
    assert len(set(found.argmax(1).tolist())) > 1
    assert all(torch.equal(value, before[key]) for key, value in learner.model.state_dict().items())


def test_the_head_learns_and_what_is_before_it_does_not_know(build: Any, experiences: list[Any]) -> None:
    learner = build("scr", "group_norm", memory_size=30, projection=8)
    other = build("scr", "group_norm", memory_size=30, projection=8)
    head = learner.model.fc3.weight.detach().clone()
    with torch.no_grad():
        other.model.fc3.weight.mul_(3.0)
    for each in (learner, other):
        each.train(experiences[0])
    assert not torch.equal(learner.model.fc3.weight, head)
    for (key, one), two in zip(learner.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(one, two) is ("fc3" not in key)


def test_what_does_not_fit_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"learner.temperature must be greater than 0"):
        build("scr", temperature=0)
    with pytest.raises(ConfigError, match=r"learner.projection must be an integer of 1 or more"):
        build("scr", projection=0)
    with pytest.raises(ConfigError, match=r"learner scr classifies by class means"):
        build("scr", "none", model=nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()))
