"""fednorm's learners on Avalanche experiences that fednorm did not make, and on its own in another order."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, benchmark_with_validation_stream
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_tensor_classification_dataset as make_tensor_classification_dataset,
)
from avalanche.models import IncrementalClassifier, as_multitask
from avalanche.models.utils import avalanche_model_adaptation
from avalanche.training.plugins import EvaluationPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import fednorm
from fednorm.avalanche import joint_to_avalanche, strategy_of, to_avalanche
from fednorm.avalanche.table import tiny_stream
from fednorm.data.domain import pixels
from fednorm.errors import ConfigError, DataError
from fednorm.norms.adab2n import AdaB2NLayer
from fednorm.norms.task_balanced_norm import TaskBalancedNormLayer
from fednorm.streams.buffer import Samples

STREAM = tiny_stream()
BENCHMARK = to_avalanche(STREAM)
IMAGES, LABELS = (torch.cat(p) for p in zip(*(e.train.batch(torch.arange(24)) for e in STREAM), strict=True))


def network(norm: str = "", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6)
    )
    return fednorm.convert(model, norm, **options) if norm else model


def learner(name: str = "naive", model: nn.Module | None = None, **template: Any) -> Any:
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    make = strategy_of(import_module(f"scenarios.learners.{name}").SPEC.make)
    return make(**{"model": model, "optimizer": optimizer, "num_classes": 6, "train_mb_size": 8, "seed": 1, **template})


def batches_of(one: Any) -> list[Samples]:
    kept: list[Samples] = []
    observe = one.observe

    def keep(new: Samples) -> Tensor:
        kept.append(new)
        return observe(new)

    one.observe = keep
    return kept


def weights(one: Any) -> Tensor:
    return torch.cat([value.flatten().double() for value in one.model.state_dict().values()])


WAYS: dict[str, Callable[[], Any]] = {
    "subset": lambda: benchmark_from_datasets(train=[BENCHMARK.train_stream[0].dataset.subset([5, 3, 9])]).train_stream,
    "concat": lambda: (
        benchmark_from_datasets(
            train=[BENCHMARK.train_stream[2].dataset.concat(BENCHMARK.train_stream[0].dataset)]
        ).train_stream
    ),
    "validation": lambda: benchmark_with_validation_stream(BENCHMARK, 0.25).train_stream,
    "online": lambda: split_online_stream(BENCHMARK.train_stream, 8, shuffle=True, seed=1),
    "test": lambda: BENCHMARK.test_stream,
    "joint": lambda: joint_to_avalanche(STREAM).train_stream,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_avalanche_derives_is_read_out_of_the_arrays(way: str, logged: Any) -> None:
    one = learner("er_ace", network("adab2n", num_tasks=3))
    kept = batches_of(one)
    for experience in WAYS[way]():
        kept.clear()
        one.train(experience)
        dataset = experience.dataset
        expected = sorted((tuple(dataset[row][0].flatten().tolist()), dataset[row][1]) for row in range(len(dataset)))
        images, labels = torch.cat([b.images for b in kept]), torch.cat([b.labels for b in kept])
        assert images.dtype == torch.uint8
        assert (
            sorted((tuple(x.flatten().tolist()), int(y)) for x, y in zip(pixels(images), labels, strict=True))
            == expected
        )
        for batch in kept:
            assert [one.tasks_seen[task] for task in batch.tasks] == (batch.labels // 2).tolist()
    assert sorted(one.tasks_seen) == {"subset": [0], "concat": [0, 2]}.get(way, [0, 1, 2])
    assert logged.records == []


@settings(max_examples=15, deadline=None)
@given(
    order=st.lists(st.integers(0, 2), min_size=1, max_size=5), name=st.sampled_from(["er", "derpp", "gdumb", "joint"])
)
def test_experiences_come_in_any_order_and_again(order: list[int], name: str) -> None:
    model = network("adab2n", num_tasks=3)
    layer = next(module for module in model.modules() if isinstance(module, AdaB2NLayer))
    options = import_module(f"scenarios.learners.{name}").SPEC.make.Options
    small = {"memory_epochs": 1} if name == "gdumb" else {}
    one = learner(name, model, options=options(**small))
    for place, number in enumerate(order):
        one.train(BENCHMARK.train_stream[number])
        seen = list(dict.fromkeys(order[: place + 1]))
        assert one.tasks_seen == seen
        assert layer._now.seen == len(seen)
        if name not in ("joint",):
            everything = one.buffer.everything()
            assert [seen[task] for task in everything.tasks] == (everything.labels // 2).tolist()


def test_tbbn_divides_the_batch_of_an_experience_that_comes_again() -> None:
    model = network("task_balanced_norm", batch_ratio=1)
    layer = next(module for module in model.modules() if isinstance(module, TaskBalancedNormLayer))
    parts: list[int] = []
    layer.register_forward_pre_hook(lambda module, args: parts.append(module.division(len(args[0]))[1]))
    one = learner("er", model)
    found = []
    for number in (0, 1, 0, 2):
        parts.clear()
        one.train(BENCHMARK.train_stream[number])
        found.append(max(parts))
    assert found == [1, 1, 1, 2]
    assert layer._current == 2


class Listed(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples, self.targets = samples, [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Any:
        return self.samples[row]


def foreign(samples: Tensor, labels: Tensor, **more: Any) -> Any:
    parts = [make_tensor_classification_dataset(samples[r], labels[r], **more) for r in (slice(0, 24), slice(24, 48))]
    return benchmark_from_datasets(train=parts).train_stream


@pytest.mark.few(3)
@pytest.mark.parametrize("name", ["naive", "er", "er_ace", "derpp", "lwf", "ewc", "gdumb"])
def test_tensors_train_as_our_own_arrays_do(name: str, logged: Any) -> None:
    """The same images as floats in a tensor data set: another way to read, the same learning."""
    options = {"gdumb": {"memory_epochs": 2}, "ewc": {"fisher_samples": 4}}.get(name, {})
    ours, theirs, loaded = (
        learner(name, options=import_module(f"scenarios.learners.{name}").SPEC.make.Options(**options))
        for _ in range(3)
    )
    floats = pixels(IMAGES)
    for experience in list(BENCHMARK.train_stream)[:2]:
        ours.train(experience)
    for experience in foreign(floats, LABELS):
        theirs.train(experience)
    assert logged.records == []
    for experience in foreign(floats - 1, LABELS, transform=lambda x: x + 1):
        loaded.train(experience)
    assert len([r for r in logged.records if "one by one" in r.message]) == 1
    # Floats made of many images at once differ in their last bits from those made of few.
    assert torch.allclose(weights(ours), weights(theirs), atol=1e-4)
    assert torch.allclose(weights(ours), weights(loaded), atol=1e-4)


def test_random_transforms_are_drawn_for_every_pass() -> None:
    one = learner(train_epochs=2)
    kept = batches_of(one)
    one.train(next(iter(foreign(pixels(IMAGES), LABELS, transform=lambda x: x + torch.rand(())))))
    first, second = (torch.cat([b.images for b in part]).sum((1, 2, 3)).sort()[0] for part in (kept[:3], kept[3:]))
    assert not torch.equal(first, second)


def test_images_and_bytes_without_a_transform_are_refused_in_a_sentence() -> None:
    image = Image.new("RGB", (8, 8))
    for samples, message in (
        (foreign(IMAGES, LABELS), "uint8 tensors.*ToTensor"),
        (_listed([(image, 0), (image, 1)]), "make no batch.*ToTensor"),
        (_listed([(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 9), 1)]), "make no batch.*Resize"),
        (_listed([(torch.zeros(3, 8, 8), torch.tensor([0.5, 0.5]))] * 2), "one class number for each sample"),
        (_listed([(torch.zeros(3, 8, 8), 9), (torch.zeros(3, 8, 8), 1)]), "labels from 1 to 9.*num_classes = 6"),
        (_listed([]), "has no samples"),
    ):
        with pytest.raises(DataError, match=message):
            learner().train(next(iter(samples)))
    with pytest.raises(DataError, match=r"labels from 2 to 3.*num_classes = 2"):
        learner(num_classes=2).train(BENCHMARK.train_stream[1])
    with pytest.raises(DataError, match=r"augment = 'crop'.*transforms"):
        learner(augment="crop").train(next(iter(foreign(IMAGES, LABELS, transform=lambda x: x / 255))))


def _listed(samples: list[Any]) -> Any:
    return benchmark_from_datasets(train=[AvalancheDataset([Listed(samples)])]).train_stream


@pytest.mark.parametrize(
    ("head", "message"),
    [(IncrementalClassifier(16), r"5 is a IncrementalClassifier, which grows"), (nn.Linear(16, 2), None)],
)
def test_a_head_that_grows_is_refused_in_a_sentence(head: nn.Module, message: str | None) -> None:
    model = network()
    model[5] = head
    if message:
        with pytest.raises(ConfigError, match=message):
            learner(model=model)
        return
    with pytest.raises(DataError, match=r"needs \(8, 6\), all outputs from the start"):
        learner(model=model).train(BENCHMARK.train_stream[0])


def test_a_head_for_each_task_is_avalanches() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier = network()[:5], nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.body(x))

    benchmark = to_avalanche(STREAM, task_labels=True)
    assert [experience.task_label for experience in benchmark.train_stream] == [0, 1, 2]
    model = as_multitask(Split(), "classifier")
    with pytest.raises(ConfigError, match="takes task labels"):
        learner(model=model)
    for experience in benchmark.train_stream:
        avalanche_model_adaptation(model, experience)
    assert set(model.classifier.classifiers) == {"0", "1", "2"}


def test_augmentation_reaches_training_images_only() -> None:
    benchmark = to_avalanche(STREAM, augment=lambda images: images * 0 + 255)
    train, test = benchmark.train_stream[0].dataset, benchmark.test_stream[0].dataset
    white = pixels(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))[0]
    assert torch.equal(train[0][0], white)
    plain = BENCHMARK.train_stream[0].dataset[0][0], BENCHMARK.test_stream[0].dataset[0][0]
    assert torch.equal(train.eval()[0][0], plain[0])
    assert torch.equal(test[0][0], plain[1])
    one = learner()
    kept = batches_of(one)
    one.train(benchmark.train_stream[0])
    assert torch.equal(kept[0].images[0], white)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")
def test_the_benchmark_knows_its_classes_and_confusion_matrices_work() -> None:
    from avalanche.evaluation.metrics import confusion_matrix_metrics

    assert (BENCHMARK.n_classes_per_exp, BENCHMARK.classes_order) == ([2, 2, 2], list(range(6)))
    with pytest.warns(UserWarning, match="No loggers"):
        evaluator = EvaluationPlugin(confusion_matrix_metrics(num_classes=6, stream=True))
    one = learner(evaluator=evaluator)
    one.train(BENCHMARK.train_stream[0])
    (matrix,) = one.eval(BENCHMARK.test_stream).values()
    assert int(matrix.best_supported_value(Tensor).sum()) == sum(len(e.test) for e in STREAM)
