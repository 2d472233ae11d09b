"""What the scenarios share: the data as one domain, the order of the classes, and who gets which rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fednorm.cards import DATA
from fednorm.data.benchmarks import Loaded, Reader
from fednorm.data.domain import Domain, Split
from fednorm.errors import ConfigError, DataError
from fednorm.options import one_of, whole
from fednorm.rng import stream
from fednorm.streams.recurring import recurring
from fednorm.streams.stream import Experience, Stream

Classes = str | int | Sequence[int]
"""How many classes the experiences have, as an option gives it."""


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
    if len(once := torch.unique(test)) < len(test):  # domains that are tested on the same images
        test = once
    return Domain(loaded.title, replace(first, index=train), replace(first, index=test))


def deal(domain: Domain, limits: Limits, seed: int, *names: str | int) -> Portion:
    """Deal a domain's rows to an experience, in the order of the arrays.

    Args:
        domain: What to deal.
        limits: How much of it.
        seed: The run's seed.
        names: The experience's part of the random streams' names ``(seed, "stream", "train" or "test", *names)``.

    Returns:
        The splits. The validation images depend on the share and the seed alone, not on the limits. A limit is dealt
        to the classes in proportion to what each has (:func:`stratified`).
    """
    rows = domain.train.index
    order = torch.from_numpy(stream(seed, "stream", "train", *names).permutation(len(rows)))
    num_held = round(len(rows) * limits.validation)
    train = stratified(order[num_held:], domain.train.targets, limits.train)
    test = torch.from_numpy(stream(seed, "stream", "test", *names).permutation(len(domain.test)))
    test = stratified(test, domain.test.targets, limits.test)
    return Portion(
        train=replace(domain.train, index=rows[train.sort().values]),
        validation=replace(domain.train, index=rows[order[:num_held].sort().values]),
        test=replace(domain.test, index=domain.test.index[test.sort().values]),
    )


def stratified(pool: Tensor, labels: Tensor, most: int) -> Tensor:
    """Return the first rows of each class in a pool, so many of each that the classes keep their proportions.

    Of n rows, n_c of class c, a limit of m leaves ``m * n_c / n`` of it, rounded by the largest remainders; of two
    equal ones that whose class is first in the pool. No class is left out where the limit has room for all.

    Args:
        pool: Rows in random order, int64, shape (n,).
        labels: The label of every row, by its number, int64.
        most: m; 0 for all.

    Returns:
        ``min(m, n)`` of the rows, in the pool's order.
    """
    total = len(pool)
    if not most or most >= total:
        return pool
    _, first, place, counts = np.unique(
        labels[pool].numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    quota, rest = np.divmod(most * counts, total)
    quota[np.lexsort((first, -rest))[: most - int(quota.sum())]] += 1
    for missing in np.flatnonzero(quota == 0) if most >= len(counts) else ():
        quota[quota.argmax()] -= 1
        quota[missing] += 1
    by_class = np.argsort(place, kind="stable")
    rank = np.empty(total, dtype=np.int64)  # of each row among those of its class
    rank[by_class] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return pool[torch.from_numpy(rank < quota[place])]


def seed_of_order(seed: int, order_seed: int | str, *, drawn: bool = True) -> int:
    """Return the seed that a stream's order is drawn from: classes, domains, permutations, random labels.

    Which images are dealt where there is a limit, initial weights and batches are the run's seed's all the same, so
    that means over orders and over initialisations can be told apart.

    Args:
        seed: The run's seed.
        order_seed: ``run`` for the same, or a number of its own.
        drawn: Whether there is an order to be drawn at all.

    Raises:
        ConfigError: It is neither, or there is no order for it to draw.
    """
    if order_seed == "run":
        return seed
    if isinstance(order_seed, str):
        raise ConfigError(f"scenario.order_seed is an integer of 0 or more, or 'run'; got {order_seed!r}.")
    whole("scenario", "order_seed", order_seed, at_least=0)
    if not drawn:
        raise ConfigError(
            f"scenario.order_seed is {order_seed}, and the order is not drawn: it is 'sorted' or 'given'. Leave "
            "order_seed out, or set the order to 'shuffled'."
        )
    return order_seed


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


def splits(scenario: str, usual: int, sizes: str = "") -> Callable[..., Stream]:
    """Return what builds a scenario that deals a data set's classes: its options are the same for every data set.

    Args:
        scenario: The scenario's name.
        usual: The default of ``num_experiences``.
        sizes: The default of ``classes_per_experience``.
    """

    def make(
        reader: Reader,
        seed: int,
        *,
        num_experiences: int = usual,
        classes_per_experience: Classes = sizes,
        class_order: str = "shuffled",
        order_seed: int | str = "run",
        train_per_experience: int = 0,
        test_per_experience: int = 0,
        blurry: float = 0.0,
        repetition: float = 0.0,
    ) -> Stream:
        """Build the stream.

        Args:
            reader: Reads the data.
            seed: The run's seed.
            num_experiences: T; where it does not divide the number of classes, the first experiences have one more. In
                scenario split, 0 for five, or fewer where some had one class only.
            classes_per_experience: In place of T: a number of classes, or one for each experience, as ``"4,3,3"``.
            class_order: ``shuffled`` by the seed, or ``sorted``.
            order_seed: Of the class order: ``run`` for the run's seed, or a number.
            train_per_experience: Most training images an experience; 0 for all.
            test_per_experience: Most test images an experience; 0 for all.
            blurry: Share of each experience's training images that are of other experiences' classes, in [0, 1).
            repetition: Probability that a class comes again in each later experience; its training images are dealt to
                those that it comes in.

        Raises:
            ConfigError: More experiences than classes, or numbers of classes that do not sum up to all of them.
            DataError: The data is missing or corrupt, or several data sets.
        """
        if classes_per_experience == sizes and num_experiences != usual:
            classes_per_experience = ""  # another number of experiences than the default's
        return class_incremental(
            scenario,
            reader,
            seed,
            num_experiences=num_experiences,
            classes_per_experience=classes_per_experience,
            class_order=class_order,
            order_seed=order_seed,
            train=train_per_experience,
            test=test_per_experience,
            usual=usual,
            blurry=blurry,
            repetition=repetition,
        )

    return make


def class_incremental(
    scenario: str,
    reader: Reader,
    seed: int,
    *,
    num_experiences: int,
    classes_per_experience: Classes,
    class_order: str,
    order_seed: int | str,
    train: int,
    test: int,
    usual: int,
    blurry: float = 0.0,
    repetition: float = 0.0,
) -> Stream:
    """Build a class-incremental stream: each experience has classes that no other has, but for those that come again.

    Classes are put in an order, renumbered in it, and cut into experiences. The order depends on its seed alone, not on
    the number of experiences.

    Args:
        scenario: The scenario's name, for errors.
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T. Of K classes each experience has K / T, the first K mod T one more where T does not divide.
        classes_per_experience: How many classes each experience has, in place of T: see :func:`class_counts`.
        class_order: ``shuffled`` or ``sorted``.
        order_seed: Of the order: see :func:`seed_of_order`.
        train: Most training images an experience; 0 for all.
        test: Most test images an experience; 0 for all.
        usual: The scenario's default of ``num_experiences``.
        blurry: See :mod:`fednorm.streams.recurring`.
        repetition: See there.

    Raises:
        ConfigError: More experiences than classes, or numbers of classes that do not sum up to all of them.
        DataError: The data is missing, corrupt or lacks images of an experience's classes.
    """
    whole("scenario", "num_experiences", num_experiences, at_least=1 if usual else 0)
    order_seed = seed_of_order(seed, order_seed, drawn=class_order != "sorted")
    loaded = load(reader)
    usual = usual or usual_number(loaded.num_classes)
    num_experiences = num_experiences or usual
    sizes = class_counts(scenario, loaded.title, loaded.num_classes, num_experiences, classes_per_experience)
    if num_experiences not in (usual, len(sizes)):
        raise ConfigError(
            f"scenario.classes_per_experience makes {len(sizes)} experiences, and scenario.num_experiences is "
            f"{num_experiences}. Leave one of the two out."
        )
    order = draw_class_order(order_seed, loaded.num_classes, class_order)
    domain = _renumbered(scenario, as_one(loaded), order)
    limits = Limits(reader.config.validation, train, test)
    starts = (0, *accumulate(sizes))
    experiences = []
    for number, (start, end) in enumerate(pairwise(starts)):
        classes = tuple(range(start, end))
        portion = deal(_only(domain, classes), limits, seed, number)
        title = f"classes {', '.join(str(order[k]) for k in classes)}"
        experiences.append(Experience(number, title, classes, portion.train, portion.validation, portion.test))
    experiences = recurring(experiences, blurry=blurry, repetition=repetition, seed=seed, order_seed=order_seed)
    again = f", blurry {blurry:g}" * bool(blurry) + f", repetition {repetition:g}" * bool(repetition)
    return Stream(
        title=f"split {loaded.title} ({_shape(sizes)} classes{again})",
        num_classes=loaded.num_classes,
        image_size=reader.image_size,
        experiences=tuple(experiences),
        class_order=order,
        classes_per_task=sizes[0] if len(set(sizes)) == 1 and not again else 0,
        first_labels=() if again else starts[:-1],
        notes=loaded.notes,
    )


def usual_number(num_classes: int) -> int:
    """Return how many experiences a data set is usually cut into: five, fewer where some had one class only.

    Fewer than four classes have an experience each.
    """
    return min(5, num_classes // 2) if num_classes > 3 else num_classes


def class_counts(
    scenario: str, title: str, num_classes: int, num_experiences: int, classes_per_experience: Classes
) -> tuple[int, ...]:
    """Return the number of classes of each experience; their sum is K.

    Args:
        scenario: The scenario's name, for errors.
        title: The data's, for errors.
        num_classes: K.
        num_experiences: T, used where nothing else is said.
        classes_per_experience: Nothing (an empty text); one number, for as many in each experience and what is left in
            the last; or one number an experience, as a list or a text: ``"4,3,3"``.

    Raises:
        ConfigError: An experience would have no class, a class no experience, or it is something else.
    """
    given = classes_per_experience
    if isinstance(given, str) and not given.strip():
        if num_experiences > num_classes:
            raise ConfigError(
                f"scenario {scenario} cannot cut the {num_classes} classes of {title} into {num_experiences} "
                "experiences: every experience needs a class of its own. Set scenario.num_experiences to "
                f"{num_classes} or less."
            )
        size, more = divmod(num_classes, num_experiences)
        return tuple(size + (number < more) for number in range(num_experiences))
    sizes = _whole_numbers(given)
    if len(sizes) == 1 and sizes[0] <= num_classes:
        full, left = divmod(num_classes, sizes[0])
        sizes = sizes * full + ((left,) if left else ())
    if sum(sizes) != num_classes:
        raise ConfigError(
            f"scenario.classes_per_experience gives {sum(sizes)} classes to {len(sizes)} experiences, and {title} has "
            f"{num_classes}: every class needs one place. Give numbers that sum up to {num_classes}."
        )
    return sizes


def _whole_numbers(given: Classes) -> tuple[int, ...]:
    parts: list[Any] = given.split(",") if isinstance(given, str) else [given]
    if isinstance(given, list | tuple):
        parts = list(given)
    try:
        numbers = tuple(int(part) if isinstance(part, str) else part for part in parts)
    except ValueError:
        numbers = ()
    if not numbers or not all(type(number) is int and number >= 1 for number in numbers):
        raise ConfigError(
            "scenario.classes_per_experience is a number of classes, or one of 1 or more for each experience, e.g. "
            f"'4,3,3'; got {given!r}."
        )
    return numbers


def _shape(sizes: tuple[int, ...]) -> str:
    """Return how many classes the experiences have: ``5 x 2``, ``4 + 3 + 3``, or ``20 x 3 to 7``."""
    if len(set(sizes)) == 1:
        return f"{len(sizes)} x {sizes[0]}"
    return " + ".join(map(str, sizes)) if len(sizes) <= 10 else f"{len(sizes)} x {min(sizes)} to {max(sizes)}"


def kept_inputs(scenario: str, reader: Reader, seed: int, *, limits: Limits) -> tuple[Loaded, Portion]:
    """Return the images that every experience of a stream has, dealt once.

    Raises:
        DataError: The data is missing or corrupt, or several data sets; or a label is outside its classes.
    """
    loaded = load(reader)
    domain = as_one(loaded)
    _check_labels(scenario, domain, loaded.num_classes)
    return loaded, deal(domain, limits, seed, "kept")


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
