"""Clients of two domains, whose images are rows of one array each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from fednorm.data.domain import Client, Federation, Split


def _federation(counts: Sequence[int], size: int = 8, classes: int = 5) -> Federation:
    draw = torch.Generator().manual_seed(7)
    total = sum(counts)
    arrays = [
        (torch.randint(0, 256, (total, 3, size, size), dtype=torch.uint8, generator=draw),
         torch.randint(0, classes, (total,), generator=draw))
        for _ in range(2)
    ]  # fmt: skip
    clients, begin = [], 0
    for number, count in enumerate(counts):
        # Clients of two domains, of one array each.
        images, labels = arrays[number % 2]
        rows = torch.arange(begin, begin + count)
        begin += count
        train, none = Split(images, labels, rows), Split(images, labels, rows[:0])
        clients.append(Client(number, f"domain{number % 2}", train, none, Split(images, labels, rows.flip(0)[:3])))
    return Federation("synthetic", classes, size, tuple(clients))


@pytest.fixture
def make_federation() -> Callable[..., Federation]:
    return _federation
