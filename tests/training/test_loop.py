"""Batches of a pass, and what was seen: the loop that clients and learners share."""

from __future__ import annotations

import pytest
import torch

from fednorm.training.loop import Tally, batches_of


@pytest.mark.parametrize(
    ("count", "size", "single", "begin", "whole", "lengths"),
    [
        (10, 4, True, 0, False, [4, 4, 2]),
        (9, 4, True, 0, False, [4, 4, 1]),
        (9, 4, False, 0, False, [4, 4, 0]),  # one image has no variance
        (9, 4, False, 1, False, [4, 0]),
        (10, 4, True, 0, True, [4, 4]),
        (8, 4, True, 0, True, [4, 4]),
        (3, 1, False, 0, False, [0, 0, 0]),
    ],
)
def test_a_pass_in_batches(count: int, size: int, single: bool, begin: int, whole: bool, lengths: list[int]) -> None:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    batches = list(batches_of(order, size, single=single, begin=begin, whole=whole))
    assert [len(rows) for rows in batches] == lengths
    assert torch.equal(torch.cat(batches), order[begin * size :][: sum(lengths)])


def test_a_tally_weighs_batches_by_their_images() -> None:
    """(4 * 0.5 + 2 * 2.0) / 6 and (3 + 1) / 6."""
    tally = Tally(torch.device("cpu"))
    tally.add(torch.tensor(0.5), torch.tensor(3), 4)
    tally.add(torch.tensor(2.0), torch.tensor(1), 2)
    assert (tally.seen, tally.means()) == (6, {"loss": 1.0, "accuracy": 4 / 6})
    assert tally.loss_sum.dtype is torch.float64
    tally.clear()
    assert tally.means() == {"loss": 0.0, "accuracy": 0.0}
