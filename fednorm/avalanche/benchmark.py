"""A stream as an Avalanche 0.6 benchmark, for any Avalanche strategy and plugin.

``benchmark.train_stream[i].dataset`` holds the rows of ``stream.experiences[i].train``, in their order. A learner that
wants whole batches takes them from there with ``Split.batch``, which decodes nothing and loops over nothing;
Avalanche's own strategies ask sample by sample, as they do of any data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fednorm.avalanche.quietly import avalanche_imports
from fednorm.data.domain import Split, pixels
from fednorm.streams.stream import Experience, Stream

with avalanche_imports():
    from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
    from avalanche.benchmarks.scenarios.generic_scenario import CLScenario, EagerCLStream
    from avalanche.benchmarks.utils import ConstantSequence, DataAttribute, TaskLabels
    from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset

Prepare = Callable[[Tensor], Tensor]
"""Maps a batch of uint8 images, shape (n, 3, H, W), to what a model is given, or to other images."""


class SplitDataset(Dataset[tuple[Tensor, int]]):
    """A split as a PyTorch data set over the shared array: image (float32, (3, H, W)) and label.

    Args:
        split: The rows.
        prepare: Maps a batch of uint8 images to what the model is given.
        source: The experience that the split belongs to, if any.
    """

    def __init__(self, split: Split, prepare: Prepare = pixels, source: Experience | None = None) -> None:
        self.split = split
        self.prepare = prepare
        self.source = source
        self.targets: list[int] = split.targets.tolist()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        images, _ = self.split.batch(torch.tensor([row]))
        return self.prepare(images)[0], self.targets[row]

    def tasks_of(self, rows: Tensor) -> Tensor | None:
        """Return the number of the experience that each of some rows comes from, int64; None where it is unknown."""
        if self.source is None:
            return None
        if self.split is self.source.train:
            return self.source.tasks_of(rows)
        return torch.full((len(rows),), self.source.number, dtype=torch.int64)


class StreamDataset(TaskAwareSupervisedClassificationDataset):  # type: ignore[misc]
    """An Avalanche data set of one split of an experience, or what Avalanche has made of such ones.

    Attributes:
        source: The experience. Subsets and concatenations have none; their rows know theirs (``SplitDataset.source``).
    """

    source: Experience


class StreamExperience(DatasetExperience):  # type: ignore[misc]
    """An experience of a :class:`StreamBenchmark`, with what Avalanche's strategies, plugins and metrics ask for.

    Attributes:
        classes_in_this_experience: Labels of its samples, ascending.
        previous_classes: Labels of all experiences before it in its stream, ascending.
        classes_seen_so_far: Both.
        future_classes: The labels that come after it and have not come yet, ascending.
        task_labels: The task labels of its samples; one.
        task_label: That one.
    """

    classes_in_this_experience: list[int]
    previous_classes: list[int]
    classes_seen_so_far: list[int]
    future_classes: list[int]
    task_labels: list[int]
    task_label: int

    @property
    def dataset(self) -> StreamDataset:
        """The samples; BiC puts others in their place."""
        data: StreamDataset = self._dataset
        return data

    @dataset.setter
    def dataset(self, data: StreamDataset) -> None:
        self._dataset = data

    @property
    def benchmark(self) -> StreamBenchmark:
        """Return the benchmark that it belongs to, as iCaRL and confusion matrices ask for it."""
        benchmark: StreamBenchmark = self.origin_stream.benchmark
        return benchmark


class StreamBenchmark(CLScenario):  # type: ignore[misc]
    """A stream as an Avalanche benchmark.

    Attributes:
        n_experiences: T.
        n_classes: K.
        classes_order: Every label, in the order in which training experiences bring it.
        n_classes_per_exp: How many labels each training experience is the first to bring.
        original_classes_in_exp: The labels of each training experience.
    """

    def __init__(self, streams: Sequence[EagerCLStream]) -> None:
        super().__init__(streams)
        for stream in streams:
            stream.benchmark = self
        train = self.streams["train"]
        new = [[k for k in e.classes_in_this_experience if k not in e.previous_classes] for e in train]
        self.n_experiences = len(train)
        self.classes_order: list[int] = [k for classes in new for k in classes]
        self.n_classes = len(self.classes_order)
        self.n_classes_per_exp: list[int] = [len(classes) for classes in new]
        self.original_classes_in_exp: list[set[int]] = [set(e.classes_in_this_experience) for e in train]


def to_avalanche(
    stream: Stream, *, prepare: Prepare = pixels, augment: Prepare | None = None, task_labels: bool = False
) -> StreamBenchmark:
    """Return the stream as an Avalanche benchmark.

    Args:
        stream: The stream.
        prepare: Maps a batch of uint8 images, shape (n, 3, H, W), to what the model is given, in training and in
            evaluation; by default :func:`fednorm.data.pixels`. Nothing random belongs here: test images get it too.
        augment: Maps a batch of uint8 images to such a batch before ``prepare``, in Avalanche's transform group
            ``train`` only: neither test images nor training images that are evaluated get it. For Avalanche's own
            strategies; fednorm's learners have an ``augment`` of their own, and read such samples one by one.
        task_labels: Whether the task label of an experience is its number, for models with a head for each task
            (``avalanche.models.as_multitask``). By default it is 0 in all: which task a sample belongs to is hidden
            from the model.

    Returns:
        A benchmark with ``train_stream`` and ``test_stream``, and ``valid_stream`` where the stream holds validation
        images back. Training data sets are in Avalanche's transform group ``train``, all others in ``eval``.
    """
    return _benchmark(stream.experiences, prepare, augment, task_labels=task_labels)


def joint_to_avalanche(stream: Stream, *, prepare: Prepare = pixels, augment: Prepare | None = None) -> StreamBenchmark:
    """Return all experiences of the stream as the one experience of an Avalanche benchmark.

    Raises:
        ConfigError: Some image has different labels in different experiences.
    """
    return _benchmark([stream.joint()], prepare, augment, task_labels=False)


def _benchmark(
    experiences: Sequence[Experience], prepare: Prepare, augment: Prepare | None, *, task_labels: bool
) -> StreamBenchmark:
    splits: dict[str, list[Split]] = {
        "train": [experience.train for experience in experiences],
        "test": [experience.test for experience in experiences],
    }
    if all(len(experience.validation) for experience in experiences):
        splits["valid"] = [experience.validation for experience in experiences]
    labels = [experience.number if task_labels else 0 for experience in experiences]
    streams = []
    for name, parts in splits.items():
        datasets = [
            _dataset(split, prepare, augment, source, label)
            for split, source, label in zip(parts, experiences, labels, strict=True)
        ]
        streams.append(
            EagerCLStream(name, _experiences([d if name == "train" else d.eval() for d in datasets], labels))
        )
    return StreamBenchmark(streams)


def _experiences(datasets: Sequence[StreamDataset], labels: Iterable[int]) -> list[StreamExperience]:
    """Return experiences with their classes timeline; lists, as Avalanche's protocol says and its heads index with."""
    classes = [sorted(dataset.targets.uniques) for dataset in datasets]
    every, seen = set().union(*classes), set[int]()
    experiences = []
    for number, (dataset, own, label) in enumerate(zip(datasets, classes, labels, strict=True)):
        experience = StreamExperience(dataset=dataset, current_experience=number)
        experience.classes_in_this_experience, experience.previous_classes = own, sorted(seen)
        seen.update(own)
        experience.classes_seen_so_far, experience.future_classes = sorted(seen), sorted(every - seen)
        experience.task_label, experience.task_labels = label, [label]
        experiences.append(experience)
    return experiences


def _dataset(
    split: Split, prepare: Prepare, augment: Prepare | None, source: Experience, task_label: int
) -> StreamDataset:
    data = SplitDataset(split, prepare if augment is None else _as_they_are, source)
    dataset = StreamDataset(
        [data],
        data_attributes=[
            DataAttribute(data.targets, "targets"),
            TaskLabels(ConstantSequence(task_label, len(data))),
        ],
        transform_groups=None
        if augment is None
        else {"train": (_OneImage(augment, prepare), None), "eval": (_OneImage(prepare), None)},
    )
    dataset.source = source
    return dataset


def _as_they_are(images: Tensor) -> Tensor:
    return images


class _OneImage:
    """What is done to a batch, done to one image; a class, and not a closure, so that it can be pickled."""

    def __init__(self, *maps: Prepare) -> None:
        self.maps = maps

    def __call__(self, image: Tensor) -> Tensor:
        images = image.unsqueeze(0)
        for change in self.maps:
            images = change(images)
        return images[0]
