"""The table of rounds among more and more clients, on a few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fednorm.bench import scale
from fednorm.data.clients import Clients
from fednorm.errors import ConfigError


def test_every_client_holds_rows_of_one_pool() -> None:
    made = scale.federation(7)
    assert isinstance(made.clients, Clients)
    assert len(made.clients) == 7
    client, other = made.clients[3], made.clients[4]
    assert (len(client.train), len(client.validation), len(client.test)) == (8, 0, 4)
    assert client.train.images.data_ptr() == other.test.images.data_ptr()
    assert not torch.equal(client.train.index, other.train.index)
    assert scale.federation(7).digest() == made.digest() != scale.federation(7, seed=1).digest()


def test_a_hundred_are_sampled_and_evaluated() -> None:
    config = scale.config_of(100_000)
    assert round(config.rounds.fraction * 100_000) == 100
    assert config.evaluate.clients == "sampled"
    assert scale.config_of(10).rounds.fraction == 1


def test_a_row_says_what_a_round_costs() -> None:
    row = scale.measured(3, rounds=2)
    assert (row["clients"], row["sampled"]) == (3, 3)
    assert all(row[key] > 0 for key in row)


@pytest.mark.parametrize(("clients", "rounds"), [([0], 1), ([], 1), ([10**8], 1), ([3], 0)])
def test_numbers_out_of_range_are_refused(clients: list[int], rounds: int) -> None:
    with pytest.raises(ConfigError, match="must be between 1 and"):
        scale.bench_scale(clients, rounds)


@pytest.mark.slow
def test_the_table_has_a_row_a_number_of_clients() -> None:
    lines: list[str] = []
    result: dict[str, Any] = scale.bench_scale([3, 600], rounds=1, on_line=lines.append)
    table = scale.scale_table(result)
    assert [row[:2] for row in table.rows] == [("3", "3"), ("600", "100")]
    assert len(lines) == 2
