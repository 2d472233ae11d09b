"""Augmentation against one image at a time, with the same draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednorm.data.augment import crop_and_flip
from fednorm.errors import DataError
from fednorm.rng import torch_stream


def one_by_one(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    n, channels, height, width = images.shape
    top, left = (torch.randint(2 * padding + 1, (n, 1), generator=generator).flatten().tolist() for _ in range(2))
    coins = torch.randint(2, (n, 1), generator=generator).flatten().tolist()
    out = []
    for image, row, column, coin in zip(images, top, left, coins, strict=True):
        canvas = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=images.dtype)
        canvas[:, padding : padding + height, padding : padding + width] = image
        cut = canvas[:, row : row + height, column : column + width]
        out.append(cut.flip(-1) if coin and flip else cut)
    return torch.stack(out)


@given(
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([torch.uint8, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_each_image_is_cropped_and_mirrored_for_itself(
    n: int, channels: int, height: int, width: int, padding: int, flip: bool, dtype: torch.dtype
) -> None:
    generator = torch_stream(n, "images")
    images = torch.randint(1, 256, (n, channels, height, width), generator=generator).to(dtype)
    kept = images.clone()
    ours = crop_and_flip(images, torch_stream(1, "augment"), padding=padding, flip=flip)
    assert ours.dtype == dtype
    assert torch.equal(ours, one_by_one(images, torch_stream(1, "augment"), padding, flip))
    assert torch.equal(images, kept)


def test_without_padding_and_flip_nothing_changes() -> None:
    images = torch.randint(0, 256, (5, 3, 6, 6), generator=torch_stream(1, "x"))
    assert torch.equal(crop_and_flip(images, torch_stream(1, "y"), padding=0, flip=False), images)


def test_places_and_coins_are_uniform() -> None:
    images = torch.zeros(9000, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 3] = 1
    where = crop_and_flip(images, torch_stream(2, "augment"), padding=1).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=81).view(9, 9)
    # Columns 2 to 4 without the mirror and 4 to 6 with it: column 4 is reached both ways.
    expected = torch.zeros(9, 9)
    expected[3:6, 2:7] = torch.tensor([500, 500, 1000, 500, 500])
    assert torch.equal(counts == 0, expected == 0)
    assert float(((counts - expected) ** 2 / expected.clamp(min=1)).sum()) < 36.1  # chi-squared, 14 degrees, p = 0.001


def test_the_same_generator_goes_on() -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=torch_stream(1, "x"))
    generator = torch_stream(1, "augment")
    first, second = crop_and_flip(images, generator), crop_and_flip(images, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, crop_and_flip(images, torch_stream(1, "augment")))


def test_a_single_image_without_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(n, C, H, W\).*got \(3, 8, 8\)"):
        crop_and_flip(torch.zeros(3, 8, 8), torch_stream(1, "augment"))
