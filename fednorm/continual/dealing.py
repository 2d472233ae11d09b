"""What the scenarios share: the data as one domain, the order of the classes, and who gets which rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fednorm.cards import DATA
from fednorm.continual.stream import Experience, Stream
from fednorm.data.benchmarks import Loaded, Reader
from fednorm.data.domain import Domain, Split
from fednorm.errors import ConfigError, DataError
from fednorm.options import one_of, whole
from fednorm.rng import stream


@dataclass(frozen=True)
class Limits:
    """How much of the data an experience gets.

    Attributes:
        validation: Share of its training images held back, in [0, 1).
        train: Most training images; 0 for all.
        test: Most test images; 0 for all.
    """

    validation: float = 0.0
    train: int = 0
    test: int = 0


@dataclass(frozen=True, eq=False)
class Portion:
    """The three splits of an experience.

    Attributes:
        train: Training images.
        validation: Images held back from them; may be empty.
        test: Test images.
    """

    train: Split
    validation: Split
    test: Split


def load(reader: Reader) -> Loaded:
    """Read the benchmark that the reader's configuration names.

    Raises:
        DataError: It is missing, corrupt, or has a label outside its classes.
    """
    return DATA[reader.config.name].read(reader)


def as_one(loaded: Loaded) -> Domain:
    """Return a benchmark's domains as one, without copying a pixel.

    Raises:
        DataError: The domains come from different data sets, whose pixels are in different arrays.
    """
    first = loaded.domains[0].train
    if len({domain.train.images.data_ptr() for domain in loaded.domains}) > 1:
        raise DataError(
            f"{loaded.title} is several data sets; this scenario is made of one. Name one with data.domains."
        )
    train = torch.cat([domain.train.index for domain in loaded.domains])
    test = torch.cat([domain.test.index for domain in loaded.domains])
    return Domain(loaded.title, replace(first, index=train), replace(first, index=test))


def deal(domain: Domain, limits: Limits, seed: int, *names: str | int) -> Portion:
    """Deal a domain's rows to an experience, in the order of the arrays.

    Args:
        domain: What to deal.
        limits: How much of it.
        seed: The run's seed.
        names: The experience's part of the random streams' names ``(seed, "stream", "train" or "test", *names)``.

    Returns:
        The splits. The validation images depend on the share and the seed alone, not on the limits.
    """
    rows = domain.train.index
    order = torch.from_numpy(stream(seed, "stream", "train", *names).permutation(len(rows)))
    num_held = round(len(rows) * limits.validation)
    train = order[num_held:]
    if limits.train:
        train = train[: limits.train]
    test = torch.from_numpy(stream(seed, "stream", "test", *names).permutation(len(domain.test)))
    if limits.test:
        test = test[: limits.test]
    return Portion(
        train=replace(domain.train, index=rows[train.sort().values]),
        validation=replace(domain.train, index=rows[order[:num_held].sort().values]),
        test=replace(domain.test, index=domain.test.index[test.sort().values]),
    )


def relabelled(portion: Portion, labels: Tensor) -> Portion:
    """Return the same rows of the same pixels with other labels, int64, shape (N,) as the whole array."""
    return Portion(*(replace(part, labels=labels) for part in (portion.train, portion.validation, portion.test)))


def draw_class_order(seed: int, num_classes: int, class_order: str) -> tuple[int, ...]:
    """Return the original class of each label: drawn from the seed (``shuffled``), or 0 to K - 1 (``sorted``).

    Raises:
        ConfigError: ``class_order`` is something else.
    """
    one_of("scenario", "class_order", class_order, ("shuffled", "sorted"))
    if class_order == "sorted":
        return tuple(range(num_classes))
    return tuple(int(k) for k in stream(seed, "stream", "class order").permutation(num_classes))


def class_incremental(
    scenario: str,
    reader: Reader,
    seed: int,
    *,
    num_experiences: int | Callable[[int], int],
    class_order: str,
    train: int,
    test: int,
) -> Stream:
    """Build a class-incremental stream: each experience has classes that no other has.

    Classes are put in an order, renumbered in it, and cut into ``num_experiences`` tasks of K / num_experiences
    labels, so that the task of a sample is ``label // classes_per_task``. The order depends on the seed alone, not on
    the number of experiences.

    Args:
        scenario: The scenario's name, for errors.
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T, or what returns it for a number of classes.
        class_order: ``shuffled`` or ``sorted``.
        train: Most training images an experience; 0 for all.
        test: Most test images an experience; 0 for all.

    Raises:
        ConfigError: More experiences than classes, or a number that does not divide them.
        DataError: The data is missing, corrupt or lacks images of an experience's classes.
    """
    if not callable(num_experiences):
        whole("scenario", "num_experiences", num_experiences, at_least=1)
    loaded = load(reader)
    if callable(num_experiences):
        num_experiences = num_experiences(loaded.num_classes)
    size = _classes_per_experience(scenario, loaded, num_experiences)
    order = draw_class_order(seed, loaded.num_classes, class_order)
    domain = _renumbered(scenario, as_one(loaded), order)
    limits = Limits(reader.config.validation, train, test)
    experiences = []
    for number in range(num_experiences):
        classes = tuple(range(number * size, (number + 1) * size))
        portion = deal(_only(domain, classes), limits, seed, number)
        title = f"classes {', '.join(str(order[k]) for k in classes)}"
        experiences.append(Experience(number, title, classes, portion.train, portion.validation, portion.test))
    return Stream(
        title=f"split {loaded.title} ({num_experiences} x {size} classes)",
        num_classes=loaded.num_classes,
        image_size=reader.image_size,
        experiences=tuple(experiences),
        class_order=order,
        classes_per_task=size,
        notes=loaded.notes,
    )


def kept_inputs(scenario: str, reader: Reader, seed: int, *, limits: Limits) -> tuple[Loaded, Portion]:
    """Return the images that every experience of a stream has, dealt once.

    Raises:
        DataError: The data is missing or corrupt, or several data sets; or a label is outside its classes.
    """
    loaded = load(reader)
    domain = as_one(loaded)
    _check_labels(scenario, domain, loaded.num_classes)
    return loaded, deal(domain, limits, seed, "kept")


def _classes_per_experience(scenario: str, loaded: Loaded, num_experiences: int) -> int:
    num_classes = loaded.num_classes
    if num_classes % num_experiences == 0:
        return num_classes // num_experiences
    fits = ", ".join(str(n) for n in range(1, num_classes + 1) if num_classes % n == 0)
    why = (
        "every experience needs a class of its own"
        if num_experiences > num_classes
        else f"{num_experiences} does not divide {num_classes}, and no class is dropped"
    )
    raise ConfigError(
        f"scenario {scenario} cannot cut the {num_classes} classes of {loaded.title} into {num_experiences} "
        f"experiences: {why}. Set scenario.num_experiences to one of {fits}."
    )


def _check_labels(scenario: str, domain: Domain, num_classes: int) -> None:
    for split in (domain.train, domain.test):
        labels = split.labels[split.index]
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise DataError(
                f"scenario {scenario}: label {int(wrong[0])} of {domain.name} is outside 0 to {num_classes - 1}."
            )


def _renumbered(scenario: str, domain: Domain, order: tuple[int, ...]) -> Domain:
    """Return the domain with each label replaced by its class's place in the order."""
    _check_labels(scenario, domain, len(order))
    place = torch.from_numpy(np.argsort(np.asarray(order, dtype=np.int64)))
    # Rows of the array that no split has may have any label: clamped, so that they can be looked up at all.
    labels = place[domain.train.labels.clamp(0, len(order) - 1)]
    return Domain(domain.name, replace(domain.train, labels=labels), replace(domain.test, labels=labels))


def _only(domain: Domain, classes: tuple[int, ...]) -> Domain:
    """Return the rows of a domain whose labels are among consecutive classes."""

    def keep(split: Split) -> Split:
        labels = split.labels[split.index]
        return replace(split, index=split.index[(labels >= classes[0]) & (labels <= classes[-1])])

    return Domain(domain.name, keep(domain.train), keep(domain.test))
