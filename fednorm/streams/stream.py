"""The nouns of continual learning: a stream is a sequence of experiences, an experience is rows of shared arrays.

Nothing here knows Avalanche; :mod:`fednorm.avalanche.benchmark` makes a benchmark of a stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fednorm.data.domain import Split
from fednorm.data.scaling import Scaling
from fednorm.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class PermutedSplit(Split):
    """A split whose pixels change places when a batch is taken; the shared array stays as it is.

    Take pixels with :meth:`batch`, never from ``images``: those are the unpermuted ones.

    Attributes:
        pixel_order: A permutation of 0 to H * W - 1, int64: pixel p of a batch is pixel ``pixel_order[p]`` of the
            array, in every channel.
    """

    pixel_order: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return permuted images (uint8) and labels of some of this split's rows, numbered 0 to n - 1."""
        images, labels = super().batch(rows)
        return images.flatten(2)[:, :, self.pixel_order].view(images.shape), labels


@dataclass(frozen=True, eq=False)
class Experience:
    """What a learner sees between two boundaries: one task.

    Attributes:
        number: Its place in the stream, from 0; also the task of each of its samples.
        title: How a table names it, e.g. ``classes 3, 5`` (of the original data) or a domain's name.
        classes: The labels it is about, ascending.
        train: Its training images.
        validation: Images held back from its training images for choosing hyper-parameters; may be empty.
        test: Its test images.
        domain: The distribution that its images are of; experiences of one name share it, and by default all do.
    """

    number: int
    title: str
    classes: tuple[int, ...]
    train: Split
    validation: Split
    test: Split
    domain: str = field(default="", kw_only=True)

    def tasks_of(self, rows: Tensor) -> Tensor:
        """Return the task of some rows of the training images, int64, shape (n,): the experience's number.

        For the norm and the buffer, which keep it with each sample; no model is told.
        """
        return torch.full((len(rows),), self.number, dtype=torch.int64)

    @property
    def splits(self) -> tuple[tuple[str, Split], ...]:
        """Return the three splits by name."""
        return ("training", self.train), ("validation", self.validation), ("test", self.test)


@dataclass(frozen=True, eq=False)
class JoinedSplit(Split):
    """Several splits as one: the rows of the first, then those of the second, and so on.

    Take pixels and labels with :meth:`batch` only; ``images``, ``labels`` and ``index`` are those of the first part.

    Attributes:
        parts: The splits.
    """

    parts: tuple[Split, ...]

    def __len__(self) -> int:
        """Return the number of images of all parts."""
        return sum(map(len, self.parts))

    @property
    def targets(self) -> Tensor:
        """Return the label of every row of all parts, int64, shape (n,)."""
        return torch.cat([part.targets for part in self.parts])

    @property
    def part_of(self) -> Tensor:
        """Return the number of the part that each row is in, int64, shape (n,)."""
        return torch.repeat_interleave(torch.tensor([len(part) for part in self.parts]))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (uint8) and labels of some rows, numbered 0 to n - 1 over all parts."""
        first, rows = self.images, rows.to(self.images.device)
        images, labels = first.new_empty((len(rows), *first.shape[1:])), self.labels.new_empty(len(rows))
        start = 0
        for part in self.parts:
            here = (rows >= start) & (rows < start + len(part))
            images[here], labels[here] = part.batch(rows[here] - start)
            start += len(part)
        return images, labels

    def inputs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some rows as a network is given them, each as its own part is scaled, and their labels."""
        images, labels = self.batch(rows)
        return Scaling.stack(part.scaling for part in self.parts)(images, self.part_of[rows]), labels


@dataclass(frozen=True, eq=False)
class JointExperience(Experience):
    """All experiences of a stream at once, for a learner that is given everything.

    Attributes:
        task_of_row: The experience that each row of the training images comes from, int64, shape (n,).
    """

    task_of_row: Tensor

    def tasks_of(self, rows: Tensor) -> Tensor:
        """Return the task of some rows of the training images, int64, shape (n,)."""
        return self.task_of_row[rows.to(self.task_of_row.device)]


@dataclass(frozen=True, eq=False)
class Stream:
    """A continual benchmark for one seed.

    Attributes:
        title: How a table names it.
        num_classes: K; labels are 0 to K - 1 in every experience.
        image_size: Height and width of the images.
        experiences: In order, numbered from 0.
        class_order: The original class of each label: label k was class ``class_order[k]``.
        classes_per_task: C where the task of a sample is ``label // C``; 0 where tasks have different numbers of
            classes, or a label does not tell its task.
        first_labels: The first label of each task where the labels of a task come one after another; else empty.
        memorization: True where the test images *are* the training images, because the labels are random and
            nothing but memory can be tested.
        notes: Sentences that belong under a table of results.

    Raises:
        DataError: An experience has no training or no test images, or a label is outside 0 to K - 1.
    """

    title: str
    num_classes: int
    image_size: int
    experiences: tuple[Experience, ...]
    class_order: tuple[int, ...]
    classes_per_task: int = 0
    memorization: bool = False
    notes: tuple[str, ...] = ()
    first_labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for experience in self.experiences:
            for name, split in experience.splits:
                self._check(f"Experience {experience.number} ({experience.title}) of {self.title}", name, split)

    def _check(self, experience: str, name: str, split: Split) -> None:
        if not len(split):
            if name == "validation":
                return
            raise DataError(
                f"{experience} has no {name} images. Give the data more images of it, or make fewer experiences, or "
                "hold back less for validation (data.validation)."
            )
        labels = split.targets
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{experience} has {name} labels from {low} to {high}; the stream's {self.num_classes} classes are "
                f"numbered 0 to {self.num_classes - 1}."
            )

    def __len__(self) -> int:
        """Return T, the number of experiences."""
        return len(self.experiences)

    def __iter__(self) -> Iterator[Experience]:
        """Yield the experiences in order."""
        return iter(self.experiences)

    @property
    def label_tells_task(self) -> bool:
        """Return whether no two tasks share a label, so that a sample's label tells its task."""
        return bool(self.classes_per_task or self.first_labels)

    def task_of(self, labels: Tensor) -> Tensor:
        """Return the task of each sample from its label: the last task whose first label is not above it.

        Raises:
            ConfigError: In this stream a label does not tell its task.
        """
        if not self.label_tells_task:
            raise ConfigError(
                f"In {self.title} a label does not tell its task: every experience has every class. Keep the task of "
                "each sample with it (Experience.tasks)."
            )
        if self.classes_per_task:
            return labels.div(self.classes_per_task, rounding_mode="floor")
        return torch.bucketize(labels, torch.tensor(self.first_labels, device=labels.device), right=True) - 1

    def joint(self) -> JointExperience:
        """Return all experiences as one.

        Raises:
            ConfigError: Some image has different labels in different experiences, so that no model can know all.
        """
        labels: dict[tuple[int, int, int], int] = {}
        for experience in self.experiences:
            train = experience.train
            pixels = train.pixel_order.data_ptr() if isinstance(train, PermutedSplit) else 0
            for row, label in zip(train.index.tolist(), train.targets.tolist(), strict=True):
                if labels.setdefault((train.images.data_ptr(), pixels, row), label) != label:
                    raise ConfigError(
                        f"In {self.title} the same image has different labels in different experiences, so that they "
                        "cannot be learned jointly. Take another learner (naive, er, ...) or another scenario."
                    )
        parts = tuple(experience.train for experience in self.experiences)
        first, last = self.experiences[0], self.experiences[-1]
        train = JoinedSplit(parts[0].images, parts[0].labels, parts[0].index, parts)
        classes = tuple(sorted({k for experience in self.experiences for k in experience.classes}))
        return JointExperience(
            last.number, "all experiences", classes, train, first.validation, first.test, train.part_of
        )

    def digest(self) -> str:
        """Return what identifies the stream: SHA-256 of its rows, labels and pixel orders, 16 hexadecimal digits.

        The pixels themselves are not read; the data's own files identify them, and data without files brings a digest
        of its pixels along (:attr:`~fednorm.data.domain.Split.content`).
        """
        digest = hashlib.sha256()
        for experience in self.experiences:
            for name, split in experience.splits:
                digest.update(f"{experience.number}|{name}|{len(split)}|{experience.classes}".encode())
                tensors = [split.index, split.targets]
                if isinstance(split, PermutedSplit):
                    tensors.append(split.pixel_order)
                for tensor in tensors:
                    digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
                digest.update(split.content.encode())
        return digest.hexdigest()[:16]
