"""iCaRL: the loss against Avalanche's, herding and class means by the paper's formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.models import NCMClassifier
from avalanche.training.losses import ICaRLLossPlugin
from torch import Tensor, nn

from fednorm.data.domain import pixels
from fednorm.errors import ConfigError
from scenarios.learners.icarl import herding


def herded_by_the_paper(features: Tensor, count: int) -> list[int]:
    """p_k = argmin over x of || mu - (phi(x) + sum of those before) / k ||."""
    mean, chosen = features.mean(0), list[int]()
    for k in range(1, min(count, len(features)) + 1):
        total = features[chosen].sum(0)
        distances = [float((mean - (x + total) / k).norm()) for x in features]
        chosen.append(min((i for i in range(len(features)) if i not in chosen), key=lambda i: distances[i]))
    return chosen


@pytest.mark.parametrize("count", [1, 5, 20, 99])
def test_herding_is_the_papers(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    features = nn.functional.normalize(torch.randn(20, 6, generator=generator, dtype=torch.float64) + 0.5, dim=1)
    assert herding(features, count).tolist() == herded_by_the_paper(features, count)


def features_of(model: Any, images: Tensor) -> Tensor:
    """What fc3 is given, of length 1, by a hook of our own."""
    kept: list[Tensor] = []
    handle = model.fc3.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().double()))
    model.eval()(pixels(images))
    handle.remove()
    return nn.functional.normalize(kept[0], dim=1)


def test_exemplar_sets_are_herded_at_an_end_and_cut_at_the_next(build: Any, experiences: list[Any]) -> None:
    learner = build("icarl", memory_size=21)
    expected: dict[int, Tensor] = {}
    for number in range(3):
        learner.train(experiences[number])
        source = experiences[number].dataset.source
        images, labels = source.train.batch(torch.arange(len(source.train)))
        most = 21 // (2 * number + 2)
        expected = {label: kept[:most] for label, kept in expected.items()}
        for label in (2 * number, 2 * number + 1):
            own = images[labels == label]
            expected[label] = own[herded_by_the_paper(features_of(learner.model, own), most)]
        learner.model.train()
        assert sorted(learner.exemplars) == sorted(expected)
        for label, kept in expected.items():
            assert torch.equal(learner.exemplars[label].images, kept), label
            assert set(learner.exemplars[label].labels.tolist()) == {label}
            assert set(learner.exemplars[label].tasks.tolist()) == {label // 2}


@pytest.mark.few(1)
@pytest.mark.parametrize("norm", ["group_norm", "batch_norm"])
def test_each_steps_loss_is_avalanches(
    norm: str, build: Any, bare: Any, watch: Any, retrace: Any, experiences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = build("icarl", norm, memory_size=20)
    drawn: list[Any] = []
    draw = learner._drawn

    def keep(new: Any) -> Any:
        drawn.append(draw(new))
        return drawn[-1]

    monkeypatch.setattr(learner, "_drawn", keep)
    batches = watch(learner)
    learner.train(experiences[:3])
    steps = iter(range(len(batches)))
    plugin = ICaRLLossPlugin()
    teacher, _ = bare(norm)

    def loss_of(model: nn.Module, new: Any) -> Tensor:
        step = next(steps)
        number, first = divmod(step, 5)
        if number and not first:
            teacher.load_state_dict(batches.states[step])
            targets = torch.arange(2 * number - 2, 2 * number)
            data = SimpleNamespace(dataset=SimpleNamespace(targets=targets))
            plugin.after_training_exp(SimpleNamespace(model=teacher, device="cpu", experience=data))
            assert plugin.old_model is not None
            plugin.old_model.eval()
        groups = [new] if drawn[step] is None else [new, drawn[step]]
        images, labels = (
            torch.cat(parts) for parts in zip(*((pixels(g.images), g.labels) for g in groups), strict=True)
        )
        logits = model(images)
        plugin.before_forward(SimpleNamespace(mb_x=images))
        return plugin(logits, labels)

    retrace([*batches.states, learner.model.state_dict()], batches, loss_of, norm=norm)
    # 8 new samples of 40, and as large a share of the exemplars.
    assert [0 if each is None else len(each) for each in drawn] == [0] * 5 + [4] * 10


def test_it_classifies_as_avalanches_nearest_class_mean(build: Any, experiences: list[Any]) -> None:
    learner = build("icarl", memory_size=20)
    images = torch.cat([e.dataset.source.test.batch(torch.arange(20))[0] for e in experiences[:3]])
    with learner.for_evaluation() as model:
        untrained = model(pixels(images))
    torch.testing.assert_close(untrained, learner.model.eval()(pixels(images)))
    learner.train(experiences[:2])
    before = {key: value.clone() for key, value in learner.model.state_dict().items()}
    ncm = NCMClassifier(normalize=True)
    means = {}
    for label, kept in learner.exemplars.items():
        mean = features_of(learner.model, kept.images).mean(0)
        means[label] = (mean / mean.norm()).float()
    ncm.replace_class_means_dict(means)
    expected = ncm(features_of(learner.model, images).float())
    with learner.for_evaluation() as model:
        found = model(pixels(images)).detach()
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()
    assert set(found.argmax(1).tolist()) == {0, 1, 2, 3}
    assert found.isfinite().all()
    assert (found[:, 4:] < found[:, :4].min()).all()
    assert all(torch.equal(value, before[key]) for key, value in learner.model.state_dict().items())


def test_a_class_that_comes_again_is_not_distilled_and_keeps_old_exemplars_in_the_running(
    build: Any, experiences: list[Any]
) -> None:
    learner = build("icarl", memory_size=40)
    learner.train(experiences[:2])
    old = learner.exemplars[0].images.clone()
    learner.source = experiences[0].dataset.source
    assert learner._distilled() == [2, 3]
    learner.train(experiences[0])
    assert sorted(learner.exemplars) == [0, 1, 2, 3]
    assert [len(samples) for _, samples in sorted(learner.exemplars.items())] == [10] * 4
    pool = torch.cat([old, experiences[0].dataset.source.train.batch(torch.arange(40))[0]])
    assert all(any(torch.equal(image, other) for other in pool) for image in learner.exemplars[0].images)


def test_what_does_not_fit_is_refused(build: Any) -> None:
    with pytest.raises(ConfigError, match=r"learner.memory_size is 9, and there are 10 classes"):
        build("icarl", memory_size=9)
    torch.manual_seed(0)
    for model in (
        nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False)),
    ):
        with pytest.raises(ConfigError, match=r"learner icarl classifies by class means.*no linear layer with 10"):
            build("icarl", model=model)
