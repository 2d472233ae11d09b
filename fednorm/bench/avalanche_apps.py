"""Avalanche's own strategies on a benchmark case, with nothing of fednorm's learner in them.

They get what makes them fast: images in memory as floats, ready for the network, in the layout in which it is faster,
PyTorch's vectorized optimizer, no evaluation, no metrics, no loggers. Augmentation is torchvision's, sample by sample,
as Avalanche's data sets have it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from fednorm.avalanche.quietly import avalanche_imports
from fednorm.bench.stream_case import StreamCase
from fednorm.data.domain import Split, pixels
from fednorm.streams.stream import Stream

with avalanche_imports():
    from avalanche.benchmarks import (
        benchmark_from_datasets,
        split_online_stream,
        with_classes_timeline,
        with_task_labels,
    )
    from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute, TaskLabels
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import ER_ACE, Replay

PADDING = 4
"""Pixels on each side before a crop."""


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images in memory, as a data set.

    Args:
        split: The images.
        transform: Applied to each image that is asked for; None for nothing.
    """

    def __init__(self, split: Split, transform: Callable[[Tensor], Tensor] | None) -> None:
        images, labels = split.batch(torch.arange(len(split)))
        self.images, self.targets, self.transform = pixels(images), labels.tolist(), transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        image = self.images[row]
        return image if self.transform is None else self.transform(image), self.targets[row]


def make_strategy(name: str, case: StreamCase, model: nn.Module) -> Any:
    """Return Avalanche's strategy for a case.

    Args:
        name: ``er_ace`` or ``replay``.
        case: The case.
        model: The network.
    """
    arguments = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=case.learning_rate, foreach=True),
        "mem_size": case.memory_size,
        "train_mb_size": case.batch_size,
        "train_epochs": 1,
        "evaluator": EvaluationPlugin(),
    }
    if name == "er_ace":
        return ER_ACE(batch_size_mem=case.batch_size, **arguments)
    return Replay(criterion=nn.CrossEntropyLoss(), **arguments)


def make_experiences(case: StreamCase, stream: Stream, *, online: bool) -> list[Any]:
    """Return what the strategy is trained on in turn, an entry an experience of the stream.

    Args:
        case: The case.
        stream: Its stream.
        online: Cut every experience into experiences of one batch, as Avalanche does for online learning: so a
            strategy fills its memory as samples come. Otherwise its ER_ACE puts the whole experience into memory
            before training on it.
    """
    steps: list[nn.Module] = []
    if case.augment != "none":
        steps.append(transforms.RandomCrop(case.image_size, padding=PADDING, fill=-1.0))  # black
    if case.augment == "crop_flip":
        steps.append(transforms.RandomHorizontalFlip())
    transform = transforms.Compose(steps) if steps else None
    parts = [_dataset(TensorImages(experience.train, transform)) for experience in stream]
    benchmark = with_task_labels(with_classes_timeline(benchmark_from_datasets(train=parts)))
    if not online:
        return list(benchmark.train_stream)
    batches = iter(split_online_stream(benchmark.train_stream, experience_size=case.batch_size, seed=case.seed))
    return [islice(batches, -(-len(part) // case.batch_size)) for part in parts]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Avalanche's warnings about itself, which it shows whatever the filters are, off standard error."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield


def _dataset(images: TensorImages) -> AvalancheDataset[Any]:
    attributes = [DataAttribute(images.targets, "targets"), TaskLabels(ConstantSequence(0, len(images)))]
    return AvalancheDataset([images], data_attributes=attributes)
