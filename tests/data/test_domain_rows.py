"""Rows of arrays are copied whole, as plain indexing would give them."""

from __future__ import annotations

import pytest
import torch

from fednorm.data.domain import taken


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other"])
@pytest.mark.parametrize("rows", [[], [3], [4, 0, 4, 2], [-1, 0, -5]], ids=str)
def test_rows_are_those_of_plain_indexing(dtype: torch.dtype, layout: str, rows: list[int]) -> None:
    array = torch.randint(0, 99, (10, 3, 4, 4)).to(dtype)
    array = array[::2] if layout == "every other" else array
    array = array.contiguous(memory_format=torch.channels_last) if layout == "channels last" else array
    where = torch.tensor(rows, dtype=torch.int64)
    ours, plain = taken(array, where), array[where]
    assert torch.equal(ours, plain)
    assert ours.stride() == plain.stride()
    assert ours.untyped_storage().data_ptr() != array.untyped_storage().data_ptr() or not rows


def test_a_row_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError):
        taken(torch.zeros(3, 2), torch.tensor([3]))
