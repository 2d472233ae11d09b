"""Who holds which rows: pure index arithmetic from labels and a seed.

Every draw comes from a stream that is named by the seed and the domain, so adding a domain, or dealing one domain to
more clients, leaves the other domains' shares as they were. Nothing is drawn again to make a share look better: an
empty share is an error that says what to change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fednorm.config import DataConfig
from fednorm.data.source import Rows
from fednorm.errors import DataError
from fednorm.rng import stream

TEST_SHARE = 0.2
"""Share of the merged images that FedBN's protocol tests on."""


@dataclass(frozen=True, eq=False)
class Share:
    """One client's rows, int64.

    Attributes:
        train: Rows of the domain's training images.
        validation: Rows of the domain's training images, none of them in ``train``.
        test: Rows of the domain's test images.
    """

    train: Rows
    validation: Rows
    test: Rows


def iid(labels: Rows, num_clients: int, rng: np.random.Generator) -> list[Rows]:
    """Deal all rows at random in shares whose sizes differ by at most one."""
    return np.array_split(rng.permutation(len(labels)).astype(np.int64), num_clients)


def dirichlet(labels: Rows, num_clients: int, rng: np.random.Generator, alpha: float) -> list[Rows]:
    """Deal each class in proportions drawn from a symmetric Dirichlet distribution.

    For each class, ``p ~ Dir(alpha, ..., alpha)`` over the clients, and the class's shuffled rows are cut at
    ``floor(n * cumsum(p))`` (Hsu et al., arXiv 1909.06335, in the per-class form of Yurochkin et al., arXiv
    1905.12022). Common code draws again until every share has ten images, which changes the distribution; this does
    not, and a share may come out empty.
    """
    shares: list[list[Rows]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        proportions = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.floor(len(rows) * np.cumsum(proportions)[:-1] + 1e-9).astype(np.int64)
        for share, part in zip(shares, np.split(rows, cuts), strict=True):
            share.append(part)
    return [rng.permutation(np.concatenate(share)) for share in shares]


def shards(labels: Rows, num_clients: int, rng: np.random.Generator, shards_per_client: int) -> list[Rows]:
    """Cut the rows, sorted by label, into equal shards and deal each client the same number of them.

    McMahan et al., arXiv 1602.05629. All rows are dealt: shard sizes differ by at most one.
    """
    shuffled = rng.permutation(len(labels)).astype(np.int64)
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(ordered, num_clients * shards_per_client)
    hands = rng.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return [rng.permutation(np.concatenate([pieces[piece] for piece in hand])) for hand in hands]


def hold_back(rows: Rows, labels: Rows, share: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Hold validation rows back from a client's rows, each class in proportion.

    The rows are sorted by label and every (1 / share)-th is held back from a random start, so that a class of m rows
    gives ``m * share`` of them up to one.

    Args:
        rows: The client's rows, in random order.
        labels: The labels of these rows.
        share: Share to hold back, in [0, 1).
        rng: The client's stream.

    Returns:
        The rows to train on, in their old order, and the rows held back: ``share * n`` rounded, at least one and at
        most n - 1 where the share is positive and n is at least 2.
    """
    total = len(rows)
    held = min(max(round(share * total), 1), total - 1) if share > 0 and total > 0 else 0
    if held == 0:
        return rows, rows[:0]
    by_label = np.argsort(labels, kind="stable")
    positions = (np.arange(held, dtype=np.int64) * total + int(rng.integers(total))) // held
    back = np.zeros(total, dtype=bool)
    back[by_label[positions]] = True
    return rows[~back], rows[back]


def merged_split(labels: Rows) -> tuple[Rows, Rows]:
    """Split merged rows 80/20, stratified by label, the same for every seed (FedBN's protocol, random state 0).

    Raises:
        DataError: A class has a single image, so it cannot be on both sides.
    """
    # Imported here because it takes a second that runs without merging need not wait for.
    from sklearn.model_selection import StratifiedShuffleSplit

    splitter = StratifiedShuffleSplit(n_splits=1, test_size=TEST_SHARE, random_state=0)
    try:
        train, test = next(splitter.split(np.zeros(len(labels)), labels))
    except ValueError as error:
        raise DataError(
            f"The merged {len(labels)} images cannot be split 80/20 by class ({error}) Set data.merge to false."
        ) from error
    return np.sort(train).astype(np.int64), np.sort(test).astype(np.int64)


def train_and_test(domain: str, labels: Rows, split_seed: int) -> tuple[Rows, Rows]:
    """Split the images of a domain without test images 80/20, each class in proportion (:func:`hold_back`).

    The stream ``(split_seed, "data", domain, "train and test")`` says how, so that runs of any seed test on the same
    images.

    Args:
        domain: The domain's name.
        labels: The labels of its images, shape (n,).
        split_seed: ``data.split_seed``.

    Returns:
        The rows to train on and those to test on, ascending.

    Raises:
        DataError: There is one image only.
    """
    if len(labels) < 2:
        raise DataError(
            f"Domain {domain} has one image, which cannot be split into training and test images. Give it more, or "
            "test images of its own."
        )
    rng = stream(split_seed, "data", domain, "train and test")
    rows = rng.permutation(len(labels)).astype(np.int64)
    train, test = hold_back(rows, labels[rows], TEST_SHARE, rng)
    return np.sort(train), np.sort(test)


def deal(domain: str, train_labels: Rows, num_test: int, config: DataConfig, seed: int) -> list[Share]:
    """Deal one domain to its clients.

    Args:
        domain: The domain's name; names the random streams.
        train_labels: The labels of its training images, shape (n,).
        num_test: How many test images it has.
        config: ``clients_per_domain``, ``partition`` and its option, ``train_per_client``, ``test_per_domain``,
            ``validation``. A client's share is capped first; its validation images come out of the capped share.
        seed: The run's seed.

    Returns:
        A share a client. Training shares are disjoint; test shares are disjoint, of equal size up to one, dealt at
        random whatever the training partition, and together all test images (or ``test_per_domain`` of them), so
        that evaluating every client scores each test image once. Where a domain has more clients than test images,
        the last of them have none.

    Raises:
        DataError: A client gets no training image, or no validation image where it should.
    """
    count = config.clients_per_domain
    _refuse_too_many(domain, (len(train_labels), num_test), config)
    rng = stream(seed, "data", domain, "train", count)
    if config.partition == "iid":
        pools = iid(train_labels, count, rng)
    elif config.partition == "dirichlet":
        pools = dirichlet(train_labels, count, rng, config.alpha)
    else:
        pools = shards(train_labels, count, rng, config.shards_per_client)
    tests = np.array_split(draw_test(domain, num_test, config, seed), count)
    shares = []
    for number, (pool, test) in enumerate(zip(pools, tests, strict=True)):
        capped = pool[: config.train_per_client] if config.train_per_client else pool
        train, validation = capped, capped[:0]
        if config.validation:
            held_rng = stream(seed, "data", domain, "validation", number)
            train, validation = hold_back(capped, train_labels[capped], config.validation, held_rng)
        share = Share(train, validation, test)
        _refuse_empty(share, f"Client {number} of domain {domain}", (len(train_labels), num_test), config)
        shares.append(share)
    return shares


def draw_test(domain: str, num_test: int, config: DataConfig, seed: int) -> Rows:
    """Return a domain's test rows in random order, at most ``test_per_domain`` of them."""
    rows = stream(seed, "data", domain, "test").permutation(num_test).astype(np.int64)
    return rows[: config.test_per_domain] if config.test_per_domain else rows


def _refuse_too_many(domain: str, totals: tuple[int, int], config: DataConfig) -> None:
    """Raise where clients or shards are so many that some must be empty, before millions of them are dealt."""
    count, shares = config.clients_per_domain, config.shards_per_client if config.partition == "shards" else 1
    if count <= totals[0] and count * shares <= max(10 * totals[0], 1000):
        return
    remedies = [f"lower data.clients_per_domain (now {count})"]
    if shares > 1:
        remedies.append(f"lower data.shards_per_client (now {shares})")
    what = "no training image" if count > totals[0] else f"shards of no image among its {shares}"
    raise DataError(
        f"Client {totals[0] if count > totals[0] else 0} of domain {domain} gets {what}: the domain has {totals[0]} "
        f"training and {totals[1]} test images for {count} clients (partition {config.partition}). Remedy: "
        f"{', or '.join(remedies)}."
    )


def _refuse_empty(share: Share, client: str, totals: tuple[int, int], config: DataConfig) -> None:
    """Raise where a client has nothing to train on, or to validate on though it should."""
    count = config.clients_per_domain
    remedies = [f"lower data.clients_per_domain (now {count})"]
    if not len(share.train):
        what = "training"
        if config.partition == "dirichlet":
            remedies += [f"raise data.alpha (now {config.alpha:g})", "take another seed"]
        if config.partition == "shards":
            remedies += [f"lower data.shards_per_client (now {config.shards_per_client})"]
    elif config.validation and not len(share.validation):
        what = "validation"
        remedies += ["give it two training images or more", "set data.validation to 0"]
    else:
        return
    raise DataError(
        f"{client} gets no {what} image: the domain has {totals[0]} training and {totals[1]} test images for "
        f"{count} clients (partition {config.partition}). Remedy: {', or '.join(remedies)}."
    )
