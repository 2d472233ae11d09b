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


def test_a_tally_goes_on_from_what_was_kept() -> None:
    """Sums in float64 of products in float32; written to before anything is added, as a checkpoint's are."""
    tally, kept = Tally(torch.device("cpu")), Tally(torch.device("cpu"))
    batches = [(0.1, 3, 7), (0.2, 1, 3), (0.3, 0, 5)]
    for loss, right, count in batches:
        tally.add(torch.tensor(loss, requires_grad=True), torch.tensor(right), count)
        kept.hits.copy_(tally.hits)
        kept.loss_sum.copy_(tally.loss_sum)
    assert tally.loss_sum.item() == sum(float(torch.tensor(loss) * count) for loss, _, count in batches)
    assert not tally.loss_sum.requires_grad
    for each in (tally, kept):
        each.add(torch.tensor(0.4), torch.tensor(2), 2)
    assert (int(kept.hits), float(kept.loss_sum)) == (6, float(tally.loss_sum))
