"""What a learner is trained on, from any Avalanche experience.

Experiences of :func:`~fednorm.avalanche.benchmark.to_avalanche`, and what Avalanche derives from them
(subsets, concatenations, validation splits, online streams), are read in whole batches out of the stream's uint8
arrays; so are data sets of tensors. All other data sets are read sample by sample, with their transforms, as
Avalanche's loader would give them.

The *task* of a sample is the number of the experience that it comes from: of the stream that fednorm made, or else of
the Avalanche experience, which for a part of an online stream is the one that the part was cut from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from fednorm.avalanche.benchmark import SplitDataset
from fednorm.avalanche.quietly import avalanche_imports
from fednorm.data.domain import Split, pixels, taken
from fednorm.errors import DataError
from fednorm.streams.stream import Experience, JointExperience

with avalanche_imports():
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.flat_data import FlatData

if TYPE_CHECKING:
    from fednorm.streams.learner import Learner

log = logging.getLogger("fednorm")

Gather = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Returns the samples and labels of some rows."""


@dataclass(frozen=True, eq=False)
class PickedSplit(Split):
    """Rows of several arrays, in any order. Take samples and labels with :meth:`batch` only.

    Attributes:
        parts: What gives the rows of each array.
        part_of_row: The part of each row, int64, shape (n,).
        row_in_part: The row's number there, int64, shape (n,).
    """

    parts: tuple[Gather, ...]
    part_of_row: Tensor
    row_in_part: Tensor

    @property
    def targets(self) -> Tensor:
        """Return the label of every row, int64, shape (n,)."""
        return self.labels

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples and labels of some rows, numbered 0 to n - 1."""
        images: Tensor | None = None
        rows = rows.to(self.labels.device)
        labels, owner, inner = self.labels[rows], self.part_of_row[rows], self.row_in_part[rows]
        for number, gather in enumerate(self.parts):
            here = (owner == number).nonzero().flatten()
            if not len(here):
                continue
            own, _ = gather(inner[here])
            if images is None:
                images = own.new_empty((len(rows), *own.shape[1:]))
            images[here.to(images.device)] = own.to(images.device)  # a data set of tensors is where its user has it
        assert images is not None
        return images, labels


@dataclass(frozen=True, eq=False)
class LoadedSplit(Split):
    """Samples that are read from a data set, one by one, whenever they are needed: transforms may be random.

    Attributes:
        dataset: The data set.
        name: How an error names it.
    """

    labels_at_hand: ClassVar[bool] = False

    dataset: Any
    name: str

    @property
    def targets(self) -> Tensor:
        """Return the label of every row, int64, shape (n,); all samples are read for it."""
        return torch.cat([self.batch(rows)[1] for rows in torch.split(self.index, 256)])

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples and labels of some rows, as Avalanche's loader would.

        Raises:
            DataError: They make no batch of tensors with class numbers.
        """
        samples = [self.dataset[row] for row in rows.tolist()]
        collate = getattr(self.dataset, "collate_fn", None) or default_collate
        try:
            images, labels = collate(samples)[:2]
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            raise DataError(
                f"The samples of {self.name} make no batch ({_first_line(error)}). A sample is a tensor and a class "
                "number, all tensors of one shape; give the data set transforms that make it so, e.g. Resize and "
                "ToTensor for images."
            ) from error
        return checked(images, labels, self.name)


def checked(samples: Any, labels: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return a batch whose samples a model can take and whose labels are class numbers, int64.

    Raises:
        DataError: It is of another kind.
    """
    if not isinstance(samples, Tensor) or samples.dtype == torch.uint8:
        kind = "uint8 tensors" if isinstance(samples, Tensor) else f"of type {type(samples).__name__}"
        raise DataError(
            f"The samples of {name} are {kind}, and go to the model as the data set gives them. Give it a transform "
            "that makes floats, e.g. torchvision's ToTensor, or lambda x: x / 255."
        )
    whole = (
        isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()
    )
    if not whole:
        form = f"{labels.dtype}, shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"The labels of {name} must be one class number for each sample; got {form}.")
    return samples, labels.long()


@dataclass(frozen=True)
class _Leaf:
    """A data set at the bottom of an Avalanche data set, and the rows of it that are used.

    Attributes:
        data: The data set.
        rows: Its rows.
        places: Where they stand in the whole.
        transformed: Whether Avalanche has transforms for them.
    """

    data: Any
    rows: Tensor
    places: Tensor
    transformed: bool

    @property
    def gather(self) -> Gather | None:
        """What gives rows out of an array, if there is one and it holds what the model is to be given."""
        if self.transformed:
            return None
        if isinstance(self.data, SplitDataset):
            return self.data.split.batch if self.data.prepare is pixels else None
        if _is_plain(self.data):
            return self._of_tensors
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The type of what :attr:`gather` gives."""
        return torch.uint8 if isinstance(self.data, SplitDataset) else self.data.tensors[0].dtype

    def _of_tensors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        samples, labels = self.data.tensors
        return taken(samples, rows.to(samples.device)), taken(labels, rows.to(labels.device)).long()

    def tasks(self, number: int) -> Tensor:
        """Return the task of each row; ``number`` where the data set knows none."""
        own = self.data.tasks_of(self.rows) if isinstance(self.data, SplitDataset) else None
        return torch.full((len(self.rows),), number, dtype=torch.int64) if own is None else own


def _is_plain(data: Any) -> bool:
    """Return whether a data set is two tensors, samples and class numbers, as PyTorch and Avalanche keep them."""
    home = type(data) is TensorDataset or type(data).__module__.startswith("avalanche.")
    if not (home and isinstance(data, TensorDataset) and len(data.tensors) == 2):
        return False
    samples, labels = data.tensors
    return samples.dtype != torch.uint8 and labels.ndim == 1 and not labels.is_floating_point()


def read(experience: Any, dataset: Any, unnamed: int) -> Experience:
    """Return what a learner is trained on.

    Args:
        experience: An Avalanche experience.
        dataset: Its data set, or what a plugin has made of it.
        unnamed: The number of an experience that has none.

    Raises:
        DataError: There are no samples, or what a look at one shows cannot be read.
    """
    number = number_of(experience, unnamed)
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"Experience {number} has no data set of samples (it is a {type(experience).__name__} with "
            f"{type(dataset).__name__}). fednorm's learners take experiences whose dataset gives samples and labels."
        )
    if not len(dataset):
        raise DataError(f"Experience {number} has no samples. Leave it out, or give the data more images of it.")
    leaves = _leaves(dataset)
    first = leaves[0]
    source = first.data.source if isinstance(first.data, SplitDataset) else None
    if source is not None and first.gather and first.data.split is source.train and _whole(first, dataset):
        return source
    tasks = torch.empty(len(dataset), dtype=torch.int64)
    for leaf in leaves:
        tasks[leaf.places] = leaf.tasks(number).cpu()
    train = _picked(leaves, len(dataset)) or _loaded(dataset, number)
    number = int(tasks.max()) if isinstance(first.data, SplitDataset) else number
    nothing = Split(train.images, train.labels, train.labels.new_empty(0, dtype=torch.int64))
    classes = () if isinstance(train, LoadedSplit) else tuple(sorted(set(train.targets.tolist())))
    return JointExperience(number, f"experience {number}", classes, train, nothing, nothing, tasks)


def experiences_of(given: Any) -> list[Any]:
    """Return the Avalanche experiences of a stream or a sequence of them, or the one that was given.

    Raises:
        DataError: It is neither.
    """
    found = [given] if hasattr(given, "dataset") else list(given) if isinstance(given, Iterable) else []
    if not found or not all(hasattr(each, "dataset") for each in found):
        raise DataError(
            f"A learner is trained on an experience of a stream, or on Avalanche's; got a {type(given).__name__}. Give "
            "stream.experiences[0], or an experience of a benchmark's train_stream."
        )
    return found


def source_of(learner: Learner, experience: Any, dataset: Any) -> Experience:
    """Return what a learner is trained on, and say once where it is read sample by sample.

    Args:
        learner: The learner.
        experience: An Avalanche experience.
        dataset: Its data set, or what a plugin has made of it.

    Raises:
        DataError: There are no samples, or none that can be read, or augmented.
    """
    source = read(experience, dataset, unnamed=max(learner.tasks_seen, default=-1) + 1)
    if isinstance(source.train, LoadedSplit):
        if learner.augment:
            raise DataError(
                f"augment = {learner.augment.text!r} is for arrays of pixels, and the samples of {source.train.name} "
                "come from its own data set. Use augment = 'none' and let the data set's transforms augment."
            )
        if not learner.slow_reading_was_said:
            learner.slow_reading_was_said = True
            tell_how(source.train)
    return source


def for_training(experience: Any) -> Any:
    """Return an experience's data set, in Avalanche's transform group for training where it has such groups."""
    dataset = getattr(experience, "dataset", None)
    return dataset.train() if dataset is not None and hasattr(dataset, "train") else dataset


def number_of(experience: Any, unnamed: int) -> int:
    """Return the number of an experience, for a part of an online stream that of the experience it was cut from."""
    whole = experience.logging() if hasattr(experience, "logging") else experience
    whole = getattr(whole, "origin_experience", None) or whole
    try:
        number = whole.current_experience
    except (AttributeError, AssertionError, ValueError):  # Avalanche asserts that it is set
        return unnamed
    return unnamed if number is None else int(number)


def _whole(leaf: _Leaf, dataset: Any) -> bool:
    return len(leaf.rows) == len(dataset) and torch.equal(leaf.rows, torch.arange(len(leaf.data)))


def _picked(leaves: Sequence[_Leaf], count: int) -> PickedSplit | None:
    gathers = [leaf.gather for leaf in leaves]
    if None in gathers or len({leaf.dtype for leaf in leaves}) > 1:
        return None
    owner, inner = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    labels = torch.empty(count, dtype=torch.int64)
    for place, leaf in enumerate(leaves):
        owner[leaf.places], inner[leaf.places] = place, leaf.rows
        labels[leaf.places] = _labels(leaf.data).cpu()[leaf.rows]
    parts = tuple(gather for gather in gathers if gather is not None)
    if len({tuple(gather(leaf.rows[:1])[0].shape) for gather, leaf in zip(parts, leaves, strict=True)}) > 1:
        return None
    return PickedSplit(torch.empty(0), labels, torch.arange(count), parts, owner, inner)


def _labels(data: Any) -> Tensor:
    return data.split.targets if isinstance(data, SplitDataset) else data.tensors[1].long()


def _loaded(dataset: Any, number: int) -> LoadedSplit:
    rows = torch.arange(len(dataset))
    return LoadedSplit(torch.empty(0), rows, rows, dataset, f"experience {number}")


def _leaves(dataset: Any) -> list[_Leaf]:
    """Return the data sets that an Avalanche data set is made of, with the rows it has of each."""
    flat = dataset._flat_data if isinstance(dataset, AvalancheDataset) else dataset
    places = np.arange(len(dataset))
    group = flat._transform_groups.current_group if isinstance(dataset, AvalancheDataset) else ""
    pending: list[tuple[Any, Any, Any, bool]] = [(flat, places, places, False)]
    leaves = []
    while pending:
        data, rows, where, transformed = pending.pop()
        if not isinstance(data, FlatData):
            leaves.append(_Leaf(data, torch.from_numpy(rows), torch.from_numpy(where), transformed))
            continue
        transformed = transformed or _transforms(data, group)
        if data._indices is not None:
            rows = np.fromiter(data._indices, dtype=np.int64, count=len(data._indices))[rows]
        starts = np.concatenate(([0], data._cumulative_sizes[:-1])).astype(np.int64)
        owner = np.searchsorted(np.asarray(data._cumulative_sizes), rows, side="right")
        for place, part in enumerate(data._datasets):
            here = owner == place
            if here.any():
                pending.append((part, rows[here] - starts[place], where[here], transformed))
    return leaves[::-1] if len(leaves) > 1 else leaves


def _transforms(data: Any, group: str) -> bool:
    """Return whether a node of an Avalanche data set changes its samples in a transform group."""
    for name in ("_frozen_transform_groups", "_transform_groups"):
        groups = getattr(data, name, None)
        if groups is None:
            continue
        try:
            transform = groups.transform_groups[group]
            if transform is not None and any(
                part is not None for part in getattr(transform, "transforms", [transform])
            ):
                return True
        except KeyError:  # Avalanche itself will say that there is no such group
            return True
    return False


def tell_how(train: LoadedSplit) -> None:
    """Say that samples are read one by one."""
    log.warning(
        "The samples of %s are read one by one through its data set, with its transforms, as Avalanche does. What "
        "to_avalanche(stream) gives, and data sets of tensors without transforms, are read in whole batches, which "
        "is faster.",
        train.name,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
