"""The pooled federation: one client with everybody's training images, in their order, and nothing else moved."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fednorm.data.domain import Client, Federation, PooledSplit, Split, pooled

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def split(count: int, seed: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count + 2, 3, 2, 2), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 5, (count + 2,), generator=draw)
    return Split(images, labels, torch.randperm(count + 2, generator=draw)[:count])


@settings(max_examples=50, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_a_pooled_split_is_its_parts_one_after_the_other(sizes: list[int], seed: int) -> None:
    parts = tuple(split(count, seed + i) for i, count in enumerate(sizes))
    union = PooledSplit.of(parts)
    everything = [part.batch(torch.arange(len(part))) for part in parts]
    images, labels = (torch.cat(column) for column in zip(*everything, strict=True))
    assert len(union) == sum(sizes)
    assert torch.equal(union.targets, labels)
    rows = torch.randperm(len(union), generator=torch.Generator().manual_seed(seed))
    for some in (rows, rows[: len(rows) // 2]):
        drawn = union.batch(some)
        assert torch.equal(drawn[0], images[some])
        assert torch.equal(drawn[1], labels[some])


def test_only_training_images_move() -> None:
    clients = tuple(
        Client(i, f"d{i}", split(n, i), split(2, 10 + i), split(3, 20 + i), held_out=i == 3)
        for i, n in enumerate((4, 2, 5, 0))
    )
    federation = Federation("three and one", 5, 2, clients)
    union = pooled(federation)
    assert [len(client.train) for client in union.clients] == [11, 0, 0, 0]
    assert [client.partition_id for client in union.training_clients] == [0]
    for before, after in zip(clients, union.clients, strict=True):
        assert (after.test, after.validation, after.held_out) == (before.test, before.validation, before.held_out)
    assert union.digest() != federation.digest()
    alone = Federation("one", 5, 2, clients[:1])
    assert pooled(alone) is alone
