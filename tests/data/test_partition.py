from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedShuffleSplit

from fednorm.config import DataConfig
from fednorm.data.partition import Share, deal, dirichlet, draw_test, hold_back, iid, merged_split, shards
from fednorm.errors import DataError
from fednorm.rng import stream

LABELS = np.arange(600, dtype=np.int64) % 10


def _rows(shares: list[Share], what: str) -> list[list[int]]:
    return [getattr(share, what).tolist() for share in shares]


def _flat(shares: list[Share], what: str) -> list[int]:
    return [row for rows in _rows(shares, what) for row in rows]


@settings(max_examples=60, deadline=None)
@given(
    num_train=st.integers(40, 300),
    num_test=st.integers(8, 60),
    clients=st.integers(1, 8),
    partition=st.sampled_from(["iid", "dirichlet", "shards"]),
    cap=st.sampled_from([0, 3, 25, 1000]),
    test_cap=st.sampled_from([0, 8, 20]),
    validation=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**40),
)
def test_shares_are_disjoint_complete_and_capped(
    num_train: int, num_test: int, clients: int, partition: str, cap: int, test_cap: int, validation: float, seed: int
) -> None:
    config = DataConfig(
        clients_per_domain=clients,
        partition=partition,
        alpha=50.0,
        train_per_client=cap,
        test_per_domain=test_cap,
        validation=validation,
    )
    labels = np.arange(num_train, dtype=np.int64) % 4
    shares = deal("d", labels, num_test, config, seed)
    assert len(shares) == clients
    own = [train + held for train, held in zip(_rows(shares, "train"), _rows(shares, "validation"), strict=True)]
    dealt = [row for rows in own for row in rows]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= set(range(num_train))
    if cap:
        assert max(map(len, own)) <= cap
    else:
        assert len(dealt) == num_train
    tested = _flat(shares, "test")
    assert len(tested) == len(set(tested)) == min(num_test, test_cap or num_test)
    assert set(tested) <= set(range(num_test))
    sizes = [len(share.test) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share, rows in zip(shares, own, strict=True):
        assert len(share.validation) == (max(round(validation * len(rows)), 1) if validation else 0)
        assert share.train.dtype == share.validation.dtype == share.test.dtype == np.int64


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_the_seed_and_the_domain_decide_and_nothing_else(partition: str) -> None:
    config = DataConfig(clients_per_domain=3, partition=partition, validation=0.1)
    first, again = (deal("a", LABELS, 50, config, 1) for _ in range(2))
    for what in ("train", "validation", "test"):
        assert _rows(first, what) == _rows(again, what)
        assert _rows(first, what) != _rows(deal("a", LABELS, 50, config, 2), what)
        assert _rows(first, what) != _rows(deal("b", LABELS, 50, config, 1), what)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_two_domains_of_equal_labels_are_dealt_independently(partition: str) -> None:
    config = DataConfig(clients_per_domain=3, partition=partition)
    a, b = ([set(rows) for rows in _rows(deal(name, LABELS, 50, config, 1), "train")] for name in ("a", "b"))
    assert all(mine != other for mine in a for other in b)


def test_a_smaller_cap_is_a_part_of_a_larger_one() -> None:
    small, large = (deal("a", LABELS, 50, DataConfig(train_per_client=n), 1)[0].train.tolist() for n in (20, 100))
    assert large[:20] == small


def test_iid_sizes_differ_by_at_most_one() -> None:
    assert sorted(map(len, iid(LABELS[:10], 3, stream(1)))) == [3, 3, 4]


def test_dirichlet_follows_its_concentration() -> None:
    """Under Dir(alpha) over K clients a class's share p has variance (K - 1) / (K^2 (K alpha + 1))."""
    clients, labels = 4, np.repeat(np.arange(200), 500)
    for alpha in (0.1, 1.0, 10.0):
        shares = dirichlet(labels, clients, stream(3, alpha.hex()), alpha)
        counts = np.stack([np.bincount(labels[rows], minlength=200) for rows in shares])
        proportions = counts / 500
        np.testing.assert_allclose(counts.sum(0), 500)
        assert proportions.mean() == pytest.approx(1 / clients)
        expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
        assert proportions.var() == pytest.approx(expected, rel=0.2)


def test_a_shard_client_has_few_classes_and_every_image_is_dealt() -> None:
    labels = np.repeat(np.arange(10), 100)
    hands = shards(labels, 10, stream(1), shards_per_client=2)
    assert sorted(row for hand in hands for row in hand.tolist()) == list(range(1000))
    assert {len(hand) for hand in hands} == {100}
    assert max(len(np.unique(labels[hand])) for hand in hands) <= 2


@settings(max_examples=80, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=120), share=st.floats(0.01, 0.9), seed=st.integers(0, 99)
)
def test_validation_holds_each_class_in_proportion(labels: list[int], share: float, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    rows = stream(seed).permutation(len(labels)) + 1000
    train, held = hold_back(rows, array, share, stream(seed, "v"))
    assert sorted([*train.tolist(), *held.tolist()]) == sorted(rows.tolist())
    assert len(held) == min(max(round(share * len(labels)), 1), len(labels) - 1)
    label_of = dict(zip(rows.tolist(), labels, strict=True))
    exact = len(held) / len(labels)
    for label in set(labels):
        got = sum(label_of[row] == label for row in held.tolist())
        assert abs(got - exact * labels.count(label)) < 1


def test_merged_split_is_fedbns() -> None:
    train, test = merged_split(LABELS)
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=0)
    expected_train, expected_test = next(splitter.split(LABELS[:, None], LABELS))
    assert train.tolist() == sorted(expected_train.tolist())
    assert test.tolist() == sorted(expected_test.tolist())
    assert np.bincount(LABELS[test]).tolist() == [12] * 10


def test_the_published_split_sizes_of_svhn_and_usps() -> None:
    """FedBN's code leaves 79,431 and 19,858 images of SVHN, 7,438 and 1,860 of USPS."""
    for total, sizes in ((99289, (79431, 19858)), (9298, (7438, 1860))):
        assert tuple(map(len, merged_split(np.arange(total) % 10))) == sizes


def test_a_class_of_one_cannot_be_merged() -> None:
    with pytest.raises(DataError, match=r"cannot be split 80/20 by class.*Set data\.merge to false"):
        merged_split(np.array([0] * 20 + [1]))


@pytest.mark.parametrize(
    ("num_train", "num_test", "options", "message"),
    [
        (2, 9, {"clients_per_domain": 3}, r"Client 2 of domain d gets no training .*clients_per_domain \(now 3\)"),
        (1, 9, {"validation": 0.5}, r"no validation image.*set data\.validation to 0"),
        (9, 9, {"clients_per_domain": 8, "partition": "dirichlet", "alpha": 0.01}, r"raise data\.alpha \(now 0\.01\)"),
    ],
)
def test_an_empty_client_is_an_error(num_train: int, num_test: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        deal("d", np.zeros(num_train, dtype=np.int64), num_test, DataConfig(**options), 1)


def test_drawn_test_rows_are_all_rows_or_the_cap() -> None:
    assert sorted(draw_test("d", 7, DataConfig(), 1).tolist()) == list(range(7))
    assert len(draw_test("d", 7, DataConfig(test_per_domain=3), 1)) == 3


def test_more_clients_than_test_images_leaves_the_last_ones_without() -> None:
    shares = deal("d", np.arange(9) % 3, 2, DataConfig(clients_per_domain=3), 1)
    assert [len(share.test) for share in shares] == [1, 1, 0]
    assert sorted(np.concatenate([share.test for share in shares]).tolist()) == [0, 1]
