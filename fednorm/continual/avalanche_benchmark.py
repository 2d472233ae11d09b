"""A stream as an Avalanche 0.6 benchmark, for any Avalanche strategy and plugin.

``benchmark.train_stream[i].dataset`` holds the rows of ``stream.experiences[i].train``, in their order. A learner that
wants whole batches takes them from there with ``Split.batch``, which decodes nothing and loops over nothing;
Avalanche's own strategies ask sample by sample, as they do of any data set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fednorm.continual.stream import Experience, Stream
from fednorm.data.domain import Split, pixels

with warnings.catch_warnings():
    # Avalanche imports GEM's solver whatever is asked of it; that none is installed matters to GEM alone.
    warnings.filterwarnings("ignore", "no QP solver found", UserWarning)
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.scenarios.generic_scenario import CLScenario
    from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute, TaskLabels
    from avalanche.benchmarks.utils.classification_dataset import TaskSet

Prepare = Callable[[Tensor], Tensor]


class SplitDataset(Dataset[tuple[Tensor, int]]):
    """A split as a PyTorch data set over the shared array: image (float32, (3, H, W)) and label.

    Args:
        split: The rows.
        prepare: Maps a batch of uint8 images to what the model is given.
    """

    def __init__(self, split: Split, prepare: Prepare = pixels) -> None:
        self.split = split
        self.prepare = prepare
        self.targets: list[int] = split.targets.tolist()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        images, _ = self.split.batch(torch.tensor([row]))
        return self.prepare(images)[0], self.targets[row]


class StreamDataset(AvalancheDataset):  # type: ignore[misc]
    """An Avalanche data set that knows the experience it was made of.

    Attributes:
        source: The experience, whose ``train`` split our learners take whole batches from.
    """

    source: Experience

    @property
    def task_pattern_indices(self) -> Any:
        """Return the rows of each task label, which some of Avalanche's strategies ask for: all, of label 0."""
        return self.targets_task_labels.val_to_idx

    @property
    def task_set(self) -> Any:
        """Return the data set of each task label."""
        return TaskSet(self)


def to_avalanche(stream: Stream, *, prepare: Prepare = pixels) -> CLScenario:
    """Return the stream as an Avalanche benchmark.

    Args:
        stream: The stream.
        prepare: Maps a batch of uint8 images, shape (n, 3, H, W), to what the model is given; by default
            :func:`fednorm.data.pixels`.

    Returns:
        A benchmark with ``train_stream`` and ``test_stream``, and ``valid_stream`` where the stream holds validation
        images back. Experiences have ``dataset``, ``classes_in_this_experience`` and the rest of Avalanche's classes
        timeline. ``task_label`` is 0 in all of them: which task a sample belongs to is hidden from the model.
    """
    return _benchmark(stream.experiences, prepare)


def joint_to_avalanche(stream: Stream, *, prepare: Prepare = pixels) -> CLScenario:
    """Return all experiences of the stream as the one experience of an Avalanche benchmark.

    Raises:
        ConfigError: Some image has different labels in different experiences.
    """
    return _benchmark([stream.joint()], prepare)


def _benchmark(experiences: Sequence[Experience], prepare: Prepare) -> CLScenario:
    splits: dict[str, list[Split]] = {
        "train": [experience.train for experience in experiences],
        "test": [experience.test for experience in experiences],
    }
    if all(len(experience.validation) for experience in experiences):
        splits["valid"] = [experience.validation for experience in experiences]
    benchmark: Any = benchmark_from_datasets(
        **{
            name: [_dataset(split, prepare, source) for split, source in zip(parts, experiences, strict=True)]
            for name, parts in splits.items()
        }
    )
    return with_task_labels(with_classes_timeline(benchmark))


def _dataset(split: Split, prepare: Prepare, source: Experience) -> StreamDataset:
    data = SplitDataset(split, prepare)
    dataset = StreamDataset(
        [data],
        data_attributes=[
            DataAttribute(data.targets, "targets"),
            TaskLabels(ConstantSequence(0, len(data))),
        ],
    )
    dataset.source = source
    return dataset
