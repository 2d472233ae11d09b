"""Clients that are made when they are asked for are the same as clients in a tuple."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fednorm.data.federation as dealing
from fednorm.config import DataConfig
from fednorm.data.clients import Clients, Counts
from fednorm.data.domain import Federation
from fednorm.data.moving import moved
from fednorm.data.normalize import normalized

CONFIG = DataConfig(
    name="digits_mini", clients_per_domain=7, validation=0.2, test_per_domain=5, held_out="faint", partition="dirichlet"
)


@pytest.fixture(scope="module")
def both() -> tuple[Federation, Federation]:
    """The same federation with a tuple of clients, and with clients that are made when asked for."""
    plain = dealing.load_federation(CONFIG, image_size=8, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dealing, "SMALL", 3)
        lazy = dealing.load_federation(CONFIG, image_size=8, seed=3)
    assert isinstance(plain.clients, tuple)
    assert isinstance(lazy.clients, Clients)
    return plain, lazy


def same(one: Federation, other: Federation) -> None:
    assert len(one.clients) == len(other.clients)
    for mine, theirs in zip(one.clients, other.clients, strict=True):
        assert (mine.partition_id, mine.domain, mine.held_out) == (theirs.partition_id, theirs.domain, theirs.held_out)
        for name in ("train", "validation", "test"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.targets, b.targets)
            assert a.scaling == b.scaling
            images = [split.inputs(torch.arange(len(split)))[0] for split in (a, b)]
            assert torch.equal(*images)


def test_they_hold_the_same_images(both: tuple[Federation, Federation]) -> None:
    plain, lazy = both
    same(plain, lazy)
    assert lazy.domains == plain.domains
    for place in (0, 5, -1, len(plain.clients) - 1):
        assert lazy.clients[place].partition_id == plain.clients[place].partition_id
    assert [client.partition_id for client in lazy.clients[2:5]] == [2, 3, 4]
    with pytest.raises(IndexError):
        lazy.clients[len(plain.clients)]
    same(normalized(plain, "domain"), normalized(lazy, "domain"))
    same(plain, moved(lazy, torch.device("cpu")))


def test_they_have_the_same_digest_and_another_client_has_another(both: tuple[Federation, Federation]) -> None:
    plain, lazy = both
    assert lazy.digest() == plain.digest()
    clients = list(plain.clients)
    changed = replace(clients[4].train, index=clients[4].train.index.flip(0))
    clients[4] = replace(clients[4], train=changed)
    assert replace(plain, clients=tuple(clients)).digest() != lazy.digest()


def test_counts_are_those_of_the_clients(both: tuple[Federation, Federation]) -> None:
    for federation in both:
        counts = federation.counts
        for client in federation.clients:
            pid = client.partition_id
            assert counts.domains[counts.domain[pid]] == client.domain
            assert bool(counts.held_out[pid]) == client.held_out
            for name in ("train", "validation", "test"):
                assert getattr(counts, name)[pid] == len(getattr(client, name))
        trains = [client.partition_id for client in federation.training_clients]
        assert counts.trains.nonzero()[0].tolist() == trains


def test_runs_are_of_one_domain_each(both: tuple[Federation, Federation]) -> None:
    for federation in both:
        runs = list(federation.counts.runs())
        assert runs == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 29)]
    assert list(Counts.of(()).runs()) == []


def test_a_client_costs_a_few_numbers(both: tuple[Federation, Federation]) -> None:
    _, lazy = both
    assert isinstance(lazy.clients, Clients)
    first, again = lazy.clients[0], lazy.clients[0]
    assert first is not again
    assert first.train.index.untyped_storage().data_ptr() == again.train.index.untyped_storage().data_ptr()
