"""Augmentation against one image at a time, with the same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, functional

from fednorm.config import resolve
from fednorm.config.augmentations import NAMES, spelled_out
from fednorm.data import augment
from fednorm.data.augment import Augmentation, crop_and_flip
from fednorm.errors import ConfigError, DataError
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


# Beside torchvision, an image at a time ------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 6), st.integers(2, 17), st.integers(2, 17))


def some_images(n: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=torch_stream(n, "images"))


@given(SIZES, st.integers(1, 3), st.floats(0, 180), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_rotation_is_torchvisions(size: tuple[int, int, int], channels: int, degrees: float, seed: int) -> None:
    images = some_images(*size, channels=channels)
    angles = augment.draw_angles(len(images), degrees, torch_stream(seed, "angles"))
    assert angles.abs().max() <= degrees
    ours = augment.rotated(images, angles)
    theirs = torch.stack([functional.rotate(i, float(a)) for i, a in zip(images, angles, strict=True)])
    assert ours.dtype == torch.uint8
    # A place in the middle of two pixels falls to either by the last bit of its sum.
    assert (ours != theirs).any(1).float().mean() <= 0.02


@pytest.mark.parametrize("angle", [0.0, 90.0, -90.0, 180.0])
def test_right_angles_move_every_pixel_to_its_place(angle: float) -> None:
    images = some_images(3, 8, 8)
    turned = augment.rotated(images, torch.full((3,), angle, dtype=torch.float64))
    assert torch.equal(turned, images.rot90(round(angle / 90) % 4, (2, 3)))


def test_each_image_is_turned_by_its_own_angle_counter_clockwise() -> None:
    images = some_images(2, 9, 9)
    turned = augment.rotated(images, torch.tensor([0.0, 90.0], dtype=torch.float64))
    assert torch.equal(turned[0], images[0])
    assert torch.equal(turned[1], images[1].rot90(1, (1, 2)))


@given(SIZES, st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_jitter_is_torchvisions(size: tuple[int, int, int], strength: float, seed: int) -> None:
    images = some_images(*size)
    kept = images.clone()
    factors, order = augment.draw_jitter(len(images), strength, torch_stream(seed, "jitter"))
    assert bool(((factors >= 1 - strength) & (factors <= 1 + strength)).all())
    acts = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    theirs = []
    for image, own, turn in zip(images, factors.float().tolist(), order.tolist(), strict=True):
        for what in turn:
            image = acts[what](image, own[what])
        theirs.append(image)
    assert torch.equal(augment.jittered(images, factors, order), torch.stack(theirs))
    assert torch.equal(images, kept)


def test_jitter_needs_colours() -> None:
    with pytest.raises(DataError, match="jitter is for images in colour, of 3 channels; these have 1"):
        augment.jittered(some_images(2, 4, 4, channels=1), *augment.draw_jitter(2, 0.4, torch_stream(1, "x")))


@given(SIZES, st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_random_resized_crop_is_torchvisions(size: tuple[int, int, int], channels: int, seed: int) -> None:
    images = some_images(*size, channels=channels)
    n, height, width = size
    boxes = augment.draw_boxes(n, height, width, torch_stream(seed, "boxes"))
    top, left, h, w = boxes.unbind(1)
    assert bool(((h > 0) & (w > 0) & (top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width)).all())
    ours = augment.resized(images, boxes)
    theirs = torch.stack(
        [
            functional.resized_crop(i.double(), *box, [height, width], antialias=False)
            for i, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert ours.dtype == torch.uint8
    # Theirs before it is rounded: halves, which are common here, fall to either side by the last bit.
    assert (ours.double() - theirs).abs().max() <= 0.5 + 1e-4


@pytest.mark.few(2)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 64), (64, 16), (1, 9)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    boxes = augment.draw_boxes(3000, height, width, torch_stream(3, "boxes")).double()
    torch.manual_seed(4)
    transform, image = RandomResizedCrop(8), torch.zeros(3, height, width)
    theirs = [transform.get_params(image, list(transform.scale), list(transform.ratio)) for _ in range(3000)]
    expected = torch.tensor(theirs, dtype=torch.float64)
    error = 4 * ((boxes.var(0) + expected.var(0)) / 3000).sqrt() + 1e-9
    assert bool(((boxes.mean(0) - expected.mean(0)).abs() <= error).all())
    spread = (boxes.std(0) - expected.std(0)).abs() / expected.std(0).clamp(min=0.5)
    assert spread.max() < 0.08


def test_a_coin_mirrors_one_image() -> None:
    images = some_images(4, 5, 6)
    coins = torch.tensor([True, False, False, True])
    mirrored = augment.flipped(images, coins)
    for image, coin, ours in zip(images, coins, mirrored, strict=True):
        assert torch.equal(ours, functional.hflip(image) if coin else image)
    assert augment.draw_coins(4000, torch_stream(1, "coins")).float().mean() == pytest.approx(0.5, abs=0.04)


# Several, by name -----------------------------------------------------------------------------------------------------


def test_names_are_spelled_in_one_way() -> None:
    assert spelled_out("none") == "none"
    assert spelled_out("crop,flip") == spelled_out("crop_flip") == spelled_out(" Crop-Flip ") == "crop_flip"
    assert spelled_out("flip, crop") == "flip,crop"
    assert spelled_out("jitter,crop,flip,rotate") == "jitter,crop_flip,rotate"
    assert resolve({"train": {"augment": ["flip", "rotate"]}}).train.augment == "flip,rotate"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mirror", "got 'mirror'"),
        ("", "got ''"),
        ("flip,flip", "names each augmentation once"),
        ("crop_flip,flip", "names each augmentation once"),
        ("none,flip", "none alone"),
        ("flp", "Did you mean 'flip'"),
        (3, "augment must be a string; got 3"),
        (["flip", 3], "augment must be a string"),
    ],
)
def test_other_names_are_refused(text: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"train": {"augment": text}})


def test_the_old_names_draw_what_they_drew() -> None:
    images = some_images(7, 12, 12)
    for name, flip in (("crop", False), ("crop_flip", True)):
        ours = Augmentation.of(name)(images, torch_stream(1, "augment"))
        assert torch.equal(ours, crop_and_flip(images, torch_stream(1, "augment"), flip=flip))
    none = Augmentation.of("none")
    assert not none
    assert none(images, torch_stream(1, "augment")) is images


def test_augmentations_follow_each_other_on_one_generator() -> None:
    images, both = some_images(5, 10, 10), Augmentation.of("rotate,flip", degrees=20)
    generator = torch_stream(1, "augment")
    ours = both(images, torch_stream(1, "augment"))
    turned = augment.rotated(images, augment.draw_angles(5, 20, generator))
    assert torch.equal(ours, augment.flipped(turned, augment.draw_coins(5, generator)))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_does_not_depend_on_pixels(name: str) -> None:
    after = []
    for images in (some_images(5, 10, 10), torch.zeros(5, 3, 10, 10, dtype=torch.uint8)):
        generator = torch_stream(1, "augment")
        out = Augmentation.of(name)(images, generator)
        assert out.shape == images.shape
        assert out.dtype == torch.uint8
        after.append(generator.get_state())
    assert torch.equal(after[0], after[1])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Augmentation.of(name)(some_images(5, 10, 10), torch_stream(1, "augment"))
    assert torch.equal(torch.get_rng_state(), before)
