"""Blurry boundaries, repetition, and a head for each task: who has which images, and what the loss is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fednorm.cards import SCENARIOS
from fednorm.config import DataConfig
from fednorm.errors import ConfigError
from fednorm.streams.heads import TaskHeads
from fednorm.streams.stream import Stream


def made(seed: int = 1, **options: Any) -> Stream:
    given = {"train_per_experience": 40, "test_per_experience": 10, **options}
    return SCENARIOS["split_digits"].stream(DataConfig(validation=0.1), image_size=8, seed=seed, options=given)


def rows(stream: Stream) -> list[set[int]]:
    sets = [set(experience.train.index.tolist()) for experience in stream]
    assert [len(each) for each in sets] == [len(experience.train) for experience in stream]
    return sets


def require_moved(stream: Stream, plain: Stream) -> None:
    """Every training image is in one experience, and nothing else has changed."""
    assert sum(map(len, rows(stream))) == len(set.union(*rows(stream)))
    assert set.union(*rows(stream)) == set.union(*rows(plain))
    for one, other in zip(stream, plain, strict=True):
        assert one.classes == other.classes
        assert torch.equal(one.test.index, other.test.index)
        assert torch.equal(one.validation.index, other.validation.index)
        assert one.train.index.tolist() == sorted(one.train.index.tolist())
    assert not stream.label_tells_task
    assert stream.digest() != plain.digest()


def foreign(stream: Stream) -> list[int]:
    return [sum(int(label) not in e.classes for label in e.train.targets) for e in stream]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_a_share_of_each_experience_is_of_other_classes(share: float) -> None:
    plain, stream = made(), made(blurry=share)
    require_moved(stream, plain)
    assert stream.title.endswith(f" (5 x 2 classes, blurry {share:g})")
    for number, (count, experience) in enumerate(zip(foreign(stream), stream, strict=True)):
        own = set(plain.experiences[number].train.index.tolist()) & rows(stream)[number]
        assert len(own) == 40 - round(share * 40)
        assert count == len(experience.train) - len(own)
        assert abs(len(experience.train) - 40) <= 4  # what is given is dealt evenly
    # From every other experience, as evenly.
    taken = [[len(rows(stream)[i] & rows(plain)[j]) for j in range(5) if j != i] for i in range(5)]
    assert all(max(each) - min(each) <= 1 for each in taken)


def test_classes_come_again_in_later_experiences_alone() -> None:
    plain = made()
    stream = made(repetition=0.5)
    require_moved(stream, plain)
    met = [set(e.train.targets.tolist()) for e in stream]
    for number, (classes, experience) in enumerate(zip(met, stream, strict=True)):
        assert set(experience.classes) <= classes
        assert max(classes) <= 2 * number + 1
    places = {label: [n for n, classes in enumerate(met) if label in classes] for label in range(10)}
    again = sum(len(where) - 1 for where in places.values())
    assert 3 <= again <= 17  # of 20 chances of one half each
    for label, where in places.items():
        counts = [int((stream.experiences[n].train.targets == label).sum()) for n in where]
        assert max(counts) - min(counts) <= 1
        assert counts[0] == max(counts)


def test_with_probability_1_all_classes_seen_are_in_every_experience() -> None:
    stream = made(repetition=1.0)
    assert [sorted(set(e.train.targets.tolist())) for e in stream] == [list(range(2 * n + 2)) for n in range(5)]


def test_the_order_s_seed_says_which_classes_and_the_run_s_which_images() -> None:
    def met(stream: Stream) -> list[list[int]]:
        return [sorted(set(e.train.targets.tolist())) for e in stream]

    one, other = made(1, repetition=0.5, order_seed=7), made(2, repetition=0.5, order_seed=7)
    assert met(one) == met(other)
    assert rows(one) != rows(other)
    assert met(made(1, repetition=0.5, order_seed=8)) != met(one)
    assert made(3, blurry=0.2).digest() == made(3, blurry=0.2).digest()


def test_nothing_is_what_it_was() -> None:
    plain = made()
    assert made(blurry=0.0, repetition=0.0).digest() == plain.digest()
    assert plain.label_tells_task
    assert plain.title.endswith(" (5 x 2 classes)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blurry": 1.0}, r"scenario\.blurry is 1: an experience would have no image of its own classes"),
        ({"blurry": -0.1}, r"scenario\.blurry is a share, 0 to 1; got -0\.1"),
        ({"repetition": 1.5}, r"scenario\.repetition is a share, 0 to 1; got 1\.5"),
        ({"blurry": 0.1, "repetition": 0.1}, r"scenario\.blurry is 0\.1 and scenario\.repetition 0\.1: two ways"),
        ({"blurry": 0.1, "num_experiences": 1}, r"scenario\.blurry lets classes come again .* there is one"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(**options)


@pytest.mark.few(3)
@pytest.mark.parametrize("learner", ["er_ace", "icarl", "lwf", "scr"])
@pytest.mark.parametrize("option", ["blurry", "repetition"])
def test_learners_train_on_classes_that_come_again(learner: str, option: str, toy: Any) -> None:
    config = toy.config("split_digits", learner, "adab2n", scenario={option: 0.5})
    document, bench = toy.run(config)
    assert [e["train"] for e in document["data"]["experiences"]] == [len(e.train) for e in bench.stream]
    assert document["final"]["task_incremental_accuracy"] is None
    assert 0 <= document["final"]["average_accuracy"] <= 1


# A head for each task -------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_head_for_each_task() -> None:
    stream = made(classes_per_experience="3,2,5")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(10, (12,), generator=generator)
    loss = TaskHeads(stream)(logits, labels)
    total = 0.0
    for z, y in zip(logits, labels.tolist(), strict=True):
        first, last = next((a, b) for a, b in ((0, 3), (3, 5), (5, 10)) if a <= y < b)
        total = total + nn.functional.cross_entropy(z[None, first:last], torch.tensor([y - first])) / 12
    torch.testing.assert_close(loss, total)
    loss.backward()
    assert logits.grad is not None
    for gradient, y in zip(logits.grad, labels.tolist(), strict=True):
        first, last = next((a, b) for a, b in ((0, 3), (3, 5), (5, 10)) if a <= y < b)
        assert not gradient[:first].any()
        assert not gradient[last:].any()


def test_new_tasks_leave_the_outputs_of_old_ones_alone(toy: Any) -> None:
    config = toy.config("split_digits", "naive", "none", train={"heads": "task"})
    bench = toy.bench(config)
    bench.learner.train(bench.training[0])
    head = bench.model.fc3.weight.detach().clone()
    bench.learner.train(bench.training[1])
    old = list(bench.stream.experiences[0].classes)
    assert torch.equal(bench.model.fc3.weight[old], head[old])
    assert not torch.equal(bench.model.fc3.weight, head)
    plain, _ = toy.run(toy.config("split_digits", "naive", "none"))
    document, _ = toy.run(config)
    assert document["final"]["task_incremental_accuracy"] is not None
    assert document["config"]["train"]["heads"] == "task"
    assert plain["accuracy_matrix"] != document["accuracy_matrix"] or plain["experiences"] != document["experiences"]


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (("domain_digits", "naive"), {}, r"train\.heads = 'task'.*experiences share classes"),
        (("split_digits", "naive"), {"scenario": {"blurry": 0.2}}, r"train\.heads = 'task'.*experiences share classes"),
        (("split_digits", "icarl"), {}, r"is a matter of cross-entropy, and learner icarl trains"),
        (("split_digits", "scr"), {}, r"is a matter of cross-entropy, and learner scr trains"),
        (("split_digits", "naive"), {"train": {"label_smoothing": 0.1}}, r"label_smoothing spreads a label over all"),
    ],
)
def test_heads_that_cannot_be_are_refused(names: Any, changes: dict[str, Any], words: str, toy: Any) -> None:
    train = {"heads": "task", **changes.pop("train", {})}
    with pytest.raises(ConfigError, match=words):
        toy.bench(toy.config(*names, "batch_norm", train=train, **changes))
