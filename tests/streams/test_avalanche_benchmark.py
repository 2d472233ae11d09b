"""A stream as an Avalanche benchmark: the same rows, and Avalanche's own strategies take it as it is."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from fednorm.avalanche.benchmark import SplitDataset, to_avalanche
from fednorm.cards import SCENARIOS
from fednorm.config import DataConfig
from fednorm.data.domain import pixels
from fednorm.rng import torch_seeded
from fednorm.streams.stream import Stream


def toy(name: str, data: DataConfig | None = None, **options: Any) -> Stream:
    config = data or DataConfig()
    return SCENARIOS[name].stream(config, image_size=8, seed=1, options=options)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [n for n in SCENARIOS.names if SCENARIOS[n].data[:1] in ((), ("digits_mini",))])
def test_the_benchmark_holds_the_rows_of_the_stream(name: str) -> None:
    stream = toy(name, train_per_experience=12)
    benchmark = to_avalanche(stream)
    assert set(benchmark.streams) == {"train", "test"}
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == len(stream)
    for experience, ours in zip(benchmark.train_stream, stream, strict=True):
        assert experience.current_experience == ours.number
        images, labels = ours.train.batch(torch.arange(len(ours.train)))
        samples = [experience.dataset[row] for row in range(len(experience.dataset))]
        assert torch.equal(torch.stack([sample[0] for sample in samples]), pixels(images))
        assert [sample[1] for sample in samples] == labels.tolist()
        assert list(experience.dataset.targets) == labels.tolist()
        assert experience.classes_in_this_experience == sorted(set(labels.tolist()))
        assert set(experience.classes_in_this_experience) <= set(ours.classes)
        assert experience.benchmark is benchmark


def test_the_task_is_hidden_and_classes_are_not() -> None:
    stream = toy("split_digits", DataConfig(validation=0.25))
    benchmark = to_avalanche(stream)
    for name in ("train", "valid", "test"):
        for number, experience in enumerate(benchmark.streams[name]):
            assert (experience.task_label, experience.task_labels) == (0, [0])
            assert {int(sample[2]) for sample in (experience.dataset[0], experience.dataset[-1])} == {0}
            assert experience.classes_in_this_experience == [2 * number, 2 * number + 1]
            assert experience.classes_seen_so_far == list(range(2 * number + 2))
    valid = benchmark.streams["valid"][2].dataset
    assert list(valid.targets) == stream.experiences[2].validation.batch(torch.arange(len(valid)))[1].tolist()


def test_images_are_prepared_as_asked_and_not_copied() -> None:
    split = toy("split_digits").experiences[0].train
    data = SplitDataset(split, lambda images: images.float() / 255)
    assert data.split.images.data_ptr() == split.images.data_ptr()
    image, label = data[5]
    assert torch.equal(image, split.images[split.index[5]].float() / 255)
    assert label == int(split.labels[split.index[5]])


def test_an_unmodified_avalanche_strategy_learns_and_forgets_on_it() -> None:
    # Imported late: fednorm silences the warning that Avalanche gives where no solver for GEM is installed.
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.logging import TextLogger
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    stream = toy("split_digits", DataConfig(domains=("scans",)), num_experiences=2)
    benchmark = to_avalanche(stream)
    with torch_seeded(1, "test"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, 10))
        strategy = Naive(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=20,
            train_epochs=6,
            eval_mb_size=100,
            evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[TextLogger(io.StringIO())]),
        )
        matrix = []
        for experience in benchmark.train_stream:
            strategy.train(experience)
            results = strategy.eval(benchmark.test_stream)
            matrix.append([results[f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp00{i}"] for i in range(2)])
    with torch.no_grad():
        for split, reported in zip((e.test for e in stream), matrix[1], strict=True):
            images, labels = split.batch(torch.arange(len(split)))
            ours = float((model(pixels(images)).argmax(1) == labels).double().mean())
            assert reported == pytest.approx(ours)
    assert matrix[0][0] > 0.5
    assert matrix[0][1] == 0
    assert matrix[1][1] > 0.5
    assert matrix[1][0] < matrix[0][0] - 0.3
