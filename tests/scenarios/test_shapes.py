"""Streams of drawn shapes: any number of classes and experiences, even or not, with and without limits."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fednorm.cards import SCENARIOS
from fednorm.config import DataConfig, resolve
from fednorm.data.benchmarks import Loaded, Reader
from fednorm.data.domain import Domain, Split
from fednorm.errors import ConfigError
from fednorm.streams import dealing
from fednorm.streams.dealing import class_counts, seed_of_order, stratified
from fednorm.streams.stream import Stream


@dataclass(frozen=True)
class Data:
    """Random labels over blank images: the first rows are for training, the others for testing."""

    labels: tuple[int, ...]
    num_train: int
    num_classes: int

    @property
    def loaded(self) -> Loaded:
        labels = torch.tensor(self.labels)
        images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
        rows = torch.arange(len(labels))
        parts = Split(images, labels, rows[: self.num_train]), Split(images, labels, rows[self.num_train :])
        return Loaded("drawn", self.num_classes, (Domain("drawn", *parts),))

    def stream(self, seed: int = 1, scenario: str = "split", validation: float = 0.0, **options: Any) -> Stream:
        with patch.object(dealing, "load", lambda _: self.loaded):
            reader = Reader(DataConfig(validation=validation), 1)
            return SCENARIOS[scenario].make(reader, seed, **options)


@st.composite
def data(draw: st.DrawFn, most: int = 9) -> Data:
    """Every class has one image or more of either kind, and some have many more than others."""
    num_classes = draw(st.integers(1, most))
    extra = st.lists(st.integers(0, num_classes - 1), max_size=30)
    train, test = ([*range(num_classes), *draw(extra)] for _ in range(2))
    return Data((*train, *test), len(train), num_classes)


def cut(num_classes: int) -> st.SearchStrategy[list[int]]:
    """Draw numbers of classes of the experiences that sum up to all of them."""
    ends = st.sets(st.integers(1, num_classes - 1)) if num_classes > 1 else st.just(set())
    return ends.map(lambda inner: np.diff([0, *sorted(inner), num_classes]).tolist())


def original(made: Data, rows: torch.Tensor) -> list[int]:
    return [made.labels[row] for row in rows.tolist()]


@given(st.data(), data(), st.integers(0, 5), st.sampled_from(["run", 0, 3, 10**12]))
@settings(max_examples=60, deadline=None)
def test_an_uneven_split_is_a_partition(draws: st.DataObject, made: Data, seed: int, order_seed: int | str) -> None:
    sizes = draws.draw(cut(made.num_classes))
    given_as = draws.draw(st.sampled_from([sizes, tuple(sizes), ",".join(map(str, sizes))]))
    assume(len(sizes) > 1 or made.num_classes == 1)  # one number alone is one for each experience
    stream = made.stream(seed, classes_per_experience=given_as, order_seed=order_seed)
    assert [len(experience.classes) for experience in stream] == sizes
    assert [k for experience in stream for k in experience.classes] == list(range(made.num_classes))
    assert sorted(stream.class_order) == list(range(made.num_classes))
    for split, rows in (("train", range(made.num_train)), ("test", range(made.num_train, len(made.labels)))):
        dealt = [row for experience in stream for row in getattr(experience, split).index.tolist()]
        assert sorted(dealt) == list(rows)  # every image once
        for experience in stream:
            part = getattr(experience, split)
            assert [stream.class_order[k] for k in part.targets.tolist()] == original(made, part.index)
            assert set(part.targets.tolist()) == set(experience.classes)
            assert stream.task_of(part.targets).tolist() == [experience.number] * len(part)
    assert stream.label_tells_task
    # The order is its seed's: as the run's own seed would give it, whatever the run's seed and the cut.
    alone = made.stream(seed if order_seed == "run" else int(order_seed), num_experiences=1)
    assert alone.class_order == stream.class_order


@given(data(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_experiences_that_do_not_divide_the_classes_differ_by_one(made: Data, num_experiences: int) -> None:
    if num_experiences > made.num_classes:
        with pytest.raises(ConfigError, match=f"Set scenario.num_experiences to {made.num_classes} or less"):
            made.stream(num_experiences=num_experiences)
        return
    sizes = [len(experience.classes) for experience in made.stream(num_experiences=num_experiences)]
    assert len(sizes) == num_experiences
    assert sum(sizes) == made.num_classes
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_a_limit_keeps_the_classes_proportions(labels: list[int], most: int, seed: int) -> None:
    pool = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    kept = stratified(pool, torch.tensor(labels), most)
    assert len(kept) == (min(most, len(labels)) or len(labels))
    dealt = [labels[row] for row in kept.tolist()]
    place = {row: at for at, row in enumerate(pool.tolist())}
    assert [place[row] for row in kept.tolist()] == sorted(place[row] for row in kept.tolist())
    classes = sorted(set(labels))
    exact = {k: Fraction(len(kept) * labels.count(k), len(labels)) for k in classes}
    roomy = len(kept) >= len(classes)
    for k in classes:
        found = dealt.count(k)
        rows = [row for row in pool.tolist() if labels[row] == k]
        assert [row for row in kept.tolist() if labels[row] == k] == rows[:found]  # the first in the pool's order
        if roomy:
            assert found >= 1
        if not roomy or min(exact.values()) >= 1:
            assert int(exact[k]) <= found <= int(exact[k]) + (exact[k].denominator > 1)  # largest remainders
    if not roomy or min(exact.values()) >= 1:
        up = {k: exact[k] - int(exact[k]) for k in classes if dealt.count(k) > int(exact[k])}
        down = {k: exact[k] - int(exact[k]) for k in classes if dealt.count(k) == int(exact[k])}
        assert not up or not down or min(up.values()) >= max(down.values())


def test_a_limit_by_hand() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3])
    pool = torch.from_numpy(np.random.default_rng(0).permutation(100))
    for most, counts in ((10, [5, 3, 1, 1]), (40, [23, 12, 4, 1]), (4, [1, 1, 1, 1]), (3, [2, 1, 0, 0])):
        kept = labels[stratified(pool, labels, most)]
        assert sum(counts) == most
        assert torch.bincount(kept, minlength=4).tolist() == counts


@pytest.mark.parametrize("scenario", ["split_digits", "split", "permuted_pixels", "permuted_labels", "random_labels"])
@pytest.mark.parametrize("seed", [1, 2])
def test_limits_are_dealt_by_class_in_every_scenario(scenario: str, seed: int) -> None:
    made = Data(tuple(k for _ in range(20) for k in range(4)) + tuple(k for _ in range(10) for k in range(4)), 80, 4)
    options = {"test_per_experience": 6} if scenario != "random_labels" else {}
    stream = made.stream(seed, scenario, num_experiences=2, train_per_experience=12, **options)
    split = scenario.startswith("split")
    for experience in stream:
        classes = sorted(stream.class_order[k] for k in experience.classes) if split else range(4)
        counts = [original(made, experience.train.index).count(k) for k in classes]
        assert counts == [6, 6] if split else counts == [3, 3, 3, 3]
        if options:
            counts = [original(made, experience.test.index).count(k) for k in classes]
            assert counts == [3, 3] if split else sorted(counts) == [1, 1, 2, 2]


@given(data(), st.sampled_from([0.0, 0.25]), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_limit_touches_neither_validation_nor_the_other_images(made: Data, share: float, limit: int) -> None:
    assume(made.num_classes >= 2)
    whole = made.stream(num_experiences=2, validation=share)
    small = made.stream(num_experiences=2, validation=share, train_per_experience=limit, test_per_experience=limit)
    for one, other in zip(whole, small, strict=True):
        assert one.validation.index.tolist() == other.validation.index.tolist()
        for split in ("train", "test"):
            rows, kept = (set(getattr(experience, split).index.tolist()) for experience in (one, other))
            assert kept <= rows
            assert len(kept) == min(limit, len(rows))


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ("", (4, 3, 3)),
        (2, (2,) * 5),
        (4, (4, 4, 2)),
        ("4", (4, 4, 2)),
        ("5, 3,2", (5, 3, 2)),
        ([1, 9], (1, 9)),
        (10, (10,)),
    ],
)
def test_classes_can_be_given_in_every_way(asked: Any, sizes: tuple[int, ...]) -> None:
    assert class_counts("split", "toy", 10, 3, asked) == sizes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("4,4", "gives 8 classes to 2 experiences, and toy has 10.*sum up to 10"),
        (11, "gives 11 classes"),
        ("4,x", "a number of classes, or one of 1 or more for each experience, e.g. '4,3,3'; got '4,x'"),
        ("4,0,6", "of 1 or more"),
        (2.5, "of 1 or more"),
        (True, "of 1 or more"),
        ([4, 6.0], "of 1 or more"),
        ({"a": 1}, "of 1 or more"),
        ([], "of 1 or more"),
        (",", "of 1 or more"),
    ],
)
def test_classes_that_are_no_partition_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        class_counts("split", "toy", 10, 3, asked)


def test_two_numbers_of_experiences_are_one_too_many() -> None:
    made = Data(tuple(range(10)) * 2, 10, 10)
    assert len(made.stream(classes_per_experience="4,6", num_experiences=2)) == 2
    with pytest.raises(ConfigError, match=r"makes 2 experiences, and scenario\.num_experiences is 3\. Leave one"):
        made.stream(classes_per_experience="4,6", num_experiences=3)
    assert made.stream(classes_per_experience="4,6").title == "split drawn (4 + 6 classes)"
    assert made.stream().title == "split drawn (5 x 2 classes)"


@pytest.mark.parametrize("scenario", ["split_digits", "permuted_pixels", "permuted_labels", "random_labels"])
def test_the_order_has_a_seed_of_its_own(scenario: str) -> None:
    made = Data(tuple(range(10)) * 8, 40, 10)
    by_run, other = made.stream(3, scenario), made.stream(4, scenario)
    apart = made.stream(4, scenario, order_seed=3)
    assert made.stream(3, scenario, order_seed=3).digest() == by_run.digest() != other.digest()
    # Everything of the order is the other run's, so that only weights and batches differ.
    assert apart.digest() == by_run.digest()


def test_the_order_s_seed_is_checked() -> None:
    assert seed_of_order(7, "run") == 7
    for wrong in ("1", "yes", -1, 1.5, True):
        with pytest.raises(ConfigError, match="order_seed"):
            seed_of_order(7, wrong)
    made = Data(tuple(range(10)) * 2, 10, 10)
    with pytest.raises(ConfigError, match="order_seed is 5, and the order is not drawn"):
        made.stream(class_order="sorted", order_seed=5)


def test_an_order_s_seed_leaves_older_runs_their_hash() -> None:
    plain = resolve({"kind": "continual"})
    assert resolve({"kind": "continual", "scenario": {"order_seed": "run"}}).hash == plain.hash
    assert resolve({"kind": "continual", "scenario": {"order_seed": 1}}).hash != plain.hash
