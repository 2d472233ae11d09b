"""CIFAR-10-C's corruptions: formulas written out, the constants of every severity, the benchmark made of them."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fednorm.cards import DATA, SCENARIOS
from fednorm.config import DataConfig
from fednorm.data import load_federation
from fednorm.data.benchmarks import Reader
from fednorm.data.corruptions import CORRUPTIONS, LEFT_OUT, SEVERITIES, corrupt, disk, enlarging, plasma
from fednorm.data.published import Published
from fednorm.errors import ConfigError

WriteFolder = Callable[..., Path]
RNG = np.random.default_rng


def pictures(count: int = 3) -> np.ndarray:
    """Smooth coloured pictures: noise would hide what a blur does."""
    rows, columns = np.mgrid[:32, :32] / 31
    one = np.stack([rows, columns, (rows + columns) / 2], axis=-1)
    return (np.stack([one * (k + 1) / count for k in range(count)]) * 255).astype(np.uint8)


def cut(x: np.ndarray) -> np.ndarray:
    return np.uint8(np.clip(x, 0, 1) * 255)


X = pictures()
FLOATS = X / 255.0


def test_fifteen_are_computed_and_four_are_left_out_with_a_reason() -> None:
    assert len(CORRUPTIONS) == 15
    assert set(LEFT_OUT) == {"motion_blur", "snow", "frost", "spatter"}
    with pytest.raises(ConfigError, match="'frost' is not computed: it is laid over six photographs"):
        corrupt(X, "frost", 1, RNG(0))
    with pytest.raises(ConfigError, match="severity is 1 to 5; got 6"):
        corrupt(X, "fog", 6, RNG(0))
    with pytest.raises(ConfigError, match="32 x 32 x 3"):
        corrupt(X[:, :16], "fog", 1, RNG(0))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_whole_numbers_of_its_generator_alone(name: str) -> None:
    before = X.copy()
    first, again = (corrupt(X, name, 5, RNG(3)) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape == X.shape
    assert np.array_equal(first, again)
    assert not np.array_equal(first, X)
    assert np.array_equal(X, before)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noises(severity: int) -> None:
    k = severity - 1
    c = [0.04, 0.06, 0.08, 0.09, 0.10][k]
    assert np.array_equal(corrupt(X, "gaussian_noise", severity, RNG(1)), cut(FLOATS + RNG(1).normal(0, c, X.shape)))
    c = [0.06, 0.1, 0.12, 0.16, 0.2][k]
    expected = cut(FLOATS + FLOATS * RNG(1).normal(0, c, X.shape))
    assert np.array_equal(corrupt(X, "speckle_noise", severity, RNG(1)), expected)
    c = [500, 250, 100, 75, 50][k]
    assert np.array_equal(corrupt(X, "shot_noise", severity, RNG(1)), cut(RNG(1).poisson(FLOATS * c) / c))
    grey = np.full((40, 32, 32, 3), 100, dtype=np.uint8)
    salted = corrupt(grey, "impulse_noise", severity, RNG(1))
    assert set(np.unique(salted)) == {0, 100, 255}
    share = np.mean(salted != 100)
    assert share == pytest.approx([0.01, 0.02, 0.03, 0.05, 0.07][k], rel=0.05)
    assert np.mean(salted == 255) == pytest.approx(share / 2, rel=0.06)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_and_defocus(severity: int) -> None:
    k = severity - 1
    sigma = [0.4, 0.6, 0.7, 0.8, 1][k]
    blurred = np.stack(
        [
            np.stack([ndimage.gaussian_filter(x[..., c], sigma, mode="nearest") for c in range(3)], axis=-1)
            for x in FLOATS
        ]
    )
    assert np.abs(corrupt(X, "gaussian_blur", severity, RNG(0)).astype(int) - cut(blurred)).max() <= 1
    radius, alias = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)][k]
    kernel = disk(radius, alias)
    assert kernel.sum() == pytest.approx(1)
    assert kernel[8, 8] == kernel.max()
    padded = np.pad(FLOATS[0], ((8, 8), (8, 8), (0, 0)), mode="reflect")  # NumPy's "reflect" leaves the edge out
    out = np.zeros((32, 32, 3))
    for row in range(17):
        for column in range(17):
            out += kernel[row, column] * padded[row : row + 32, column : column + 32]
    assert np.abs(corrupt(X, "defocus_blur", severity, RNG(0))[0].astype(int) - cut(out)).max() <= 1


def test_a_disk_smoothed_by_a_3_by_3_gaussian() -> None:
    w = np.exp(-1 / (2 * 0.5**2))
    corner, edge, middle = w * w, w, 1.0
    total = (1 + 2 * w) ** 2
    kernel = disk(0.4, 0.5)  # of one pixel before it is smoothed
    assert kernel[7:10, 7:10] == pytest.approx(
        np.array([[corner, edge, corner], [edge, middle, edge], [corner, edge, corner]]) / total
    )
    assert disk(1, 1e-3)[7:10, 7:10] == pytest.approx(np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5)


def test_zoom_blur_is_the_mean_of_enlarged_middles() -> None:
    for severity, factors in ((1, 6), (5, 26)):
        total = FLOATS[0].copy()
        steps = np.arange(1, 1 + 0.05 * severity + 0.01, 0.01)[:factors]
        for factor in steps:
            kept = int(np.ceil(32 / factor))
            start = (32 - kept) // 2
            drawn = ndimage.zoom(FLOATS[0][start : start + kept, start : start + kept], (factor, factor, 1), order=1)
            trim = (drawn.shape[0] - 32) // 2
            total += drawn[trim : trim + 32, trim : trim + 32]
        expected = cut(total / (factors + 1))
        assert np.abs(corrupt(X, "zoom_blur", severity, RNG(0))[0].astype(int) - expected).max() <= 1
    assert enlarging(1.0) == pytest.approx(np.eye(32))


def test_glass_blur_copies_neighbours_as_the_published_script_does() -> None:
    sigma, reach, times = 0.25, 1, 2  # severity 4
    rng = RNG(5)
    x = np.uint8(ndimage.gaussian_filter(FLOATS[0], (sigma, sigma, 0), mode="nearest") * 255)
    for _ in range(times):
        for h in range(32 - reach, reach, -1):
            for w in range(32 - reach, reach, -1):
                dx, dy = rng.integers(-reach, reach, size=(2, 1))[:, 0]
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]  # views: no swap
    expected = cut(ndimage.gaussian_filter(x / 255.0, (sigma, sigma, 0), mode="nearest"))
    assert np.array_equal(corrupt(X[:1], "glass_blur", 4, RNG(5))[0], expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_colours(severity: int) -> None:
    k = severity - 1
    small = RNG(2).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    bright, strong = np.zeros((32, 32, 3)), np.zeros((32, 32, 3))
    c, (s, d) = [0.05, 0.1, 0.15, 0.2, 0.3][k], [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)][k]
    for place in np.ndindex(32, 32):
        h, saturation, v = colorsys.rgb_to_hsv(*(small[0][place] / 255.0))
        bright[place] = colorsys.hsv_to_rgb(h, saturation, min(v + c, 1))
        strong[place] = colorsys.hsv_to_rgb(h, min(saturation * s + d, 1), v)
    assert np.abs(corrupt(small, "brightness", severity, RNG(0))[0].astype(int) - cut(bright)).max() <= 1
    assert np.abs(corrupt(small, "saturate", severity, RNG(0))[0].astype(int) - cut(strong)).max() <= 1
    c = [0.75, 0.5, 0.4, 0.3, 0.15][k]
    mean = FLOATS[0].mean(axis=(0, 1))
    assert (
        np.abs(corrupt(X, "contrast", severity, RNG(0))[0].astype(int) - cut((FLOATS[0] - mean) * c + mean)).max() <= 1
    )


def published_plasma(size: int, decay: float, draws: list[np.ndarray]) -> np.ndarray:
    """The diamond-square algorithm as its author wrote it, of one map, with the random numbers given."""
    m = np.zeros((size, size))
    step, wibble, draws = size, 100.0, list(draws)

    def mean(array: np.ndarray) -> np.ndarray:
        return array / 4 + wibble * draws.pop(0)

    while step >= 2:
        h = step // 2
        corner = m[0:size:step, 0:size:step]
        accumulated = corner + np.roll(corner, shift=-1, axis=0)
        accumulated = accumulated + np.roll(accumulated, shift=-1, axis=1)
        m[h:size:step, h:size:step] = mean(accumulated)
        dr, ul = m[h:size:step, h:size:step], m[0:size:step, 0:size:step]
        ldr, lul = dr + np.roll(dr, 1, axis=0), ul + np.roll(ul, -1, axis=1)
        m[0:size:step, h:size:step] = mean(ldr + lul)
        tdr, tul = dr + np.roll(dr, 1, axis=1), ul + np.roll(ul, -1, axis=0)
        m[h:size:step, 0:size:step] = mean(tdr + tul)
        step, wibble = h, wibble / decay
    m -= m.min()
    return m / m.max()


def test_fog_is_a_plasma_fractal_over_the_picture() -> None:
    size, decay = 8, 2.5
    rng, draws, step, wobble = RNG(7), [], size, 100.0
    while step >= 2:
        draws += [rng.uniform(-wobble, wobble, (1, size // step, size // step))[0] for _ in range(3)]
        step, wobble = step // 2, wobble / decay
    assert plasma(1, size, decay, RNG(7))[0] == pytest.approx(published_plasma(size, decay, draws))
    fractal = plasma(len(X), 32, 2, RNG(4))
    assert (fractal.min(), fractal.max()) == (0, 1)
    top = FLOATS.max(axis=(1, 2, 3))[:, None, None, None]
    assert np.array_equal(corrupt(X, "fog", 4, RNG(4)), cut((FLOATS + 1 * fractal[..., None]) * top / (top + 1)))


def test_elastic_transform_moves_pixels_and_not_their_levels() -> None:
    grey = np.full((1, 32, 32, 3), 77, dtype=np.uint8)
    assert np.abs(corrupt(grey, "elastic_transform", 3, RNG(0)).astype(int) - 77).max() <= 1  # 77 / 255 in float32
    # Severity 1 has no displacement: the affine map alone, by least squares from where a ramp's levels came from.
    rng = RNG(1)
    points = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])
    moved = points + rng.uniform(-32 * 0.08, 32 * 0.08, (3, 2))
    matrix = np.linalg.solve(np.column_stack([points, np.ones(3)]), moved).T
    out = corrupt(X[2:], "elastic_transform", 1, RNG(1))[0].astype(float)
    target = matrix[:, :2] @ [16.0, 16.0] + matrix[:, 2]  # where the middle went, (x, y)
    row, column = round(target[1]), round(target[0])
    back = np.linalg.solve(matrix[:, :2], np.array([column, row]) - matrix[:, 2])
    assert out[row, column, 1] == pytest.approx(255 * back[0] / 31, abs=2.1)
    assert out[row, column, 0] == pytest.approx(255 * back[1] / 31, abs=2.1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_and_jpeg(severity: int) -> None:
    side = [30, 28, 27, 24, 20][severity - 1]
    box = Image.Resampling.BOX
    expected = Image.fromarray(X[1]).resize((side, side), box).resize((32, 32), box)
    assert np.array_equal(corrupt(X, "pixelate", severity, RNG(0))[1], np.asarray(expected))
    buffer = io.BytesIO()
    Image.fromarray(X[1]).save(buffer, "JPEG", quality=[80, 65, 58, 50, 40][severity - 1])
    assert np.array_equal(corrupt(X, "jpeg_compression", severity, RNG(0))[1], np.asarray(Image.open(buffer)))


# The benchmark --------------------------------------------------------------------------------------------------------


def test_each_domain_has_every_test_image_and_its_own_training_images(
    tmp_path: Path, write_folder: WriteFolder
) -> None:
    directory = write_folder(tmp_path / "data", "cifar10", num_train=24, num_test=6).parent
    config = DataConfig(name="cifar10_c", dir=str(directory), domains=("clean", "brightness_3", "fog_5"))
    whole = DATA["cifar10_c"].read(Reader(config, 32))
    assert [domain.name for domain in whole.domains] == ["clean", "brightness_3", "fog_5"]
    assert [(len(domain.train), len(domain.test)) for domain in whole.domains] == [(8, 6)] * 3
    plain = DATA["cifar10"].read(Reader(config.replace(name="cifar10", domains=()), 32)).domains[0]
    clean, bright, _ = whole.domains
    images, labels = plain.test.images[plain.test.index], plain.test.targets
    assert clean.test.images[clean.test.index].equal(images)
    assert all(domain.test.targets.equal(labels) for domain in whole.domains)
    expected = corrupt(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()), "brightness", 3, RNG(0))
    assert np.array_equal(bright.test.images[bright.test.index].permute(0, 2, 3, 1).numpy(), expected)
    small = DATA["cifar10_c"].read(Reader(config, 16))
    assert small.domains[0].train.images.shape == (42, 3, 16, 16)
    stream = SCENARIOS["domain_digits"].stream(config, image_size=32, seed=1)
    assert len(stream) == 3


def test_a_held_out_corruption_takes_no_training_image(tmp_path: Path, write_folder: WriteFolder) -> None:
    directory = write_folder(tmp_path / "data", "cifar10", num_train=24, num_test=6).parent
    config = DataConfig(name="cifar10_c", dir=str(directory), domains=("clean", "fog_5"), held_out="fog_5")
    federation = load_federation(config, image_size=32, seed=1)
    assert [(client.domain, len(client.train), len(client.test)) for client in federation.clients] == [
        ("clean", 24, 6),
        ("fog_5", 0, 6),
    ]
    assert federation.digest() == load_federation(config, image_size=32, seed=1).digest()


def test_an_estimate_reads_and_corrupts_nothing() -> None:
    whole = DATA["cifar10_c"].read(Published(DataConfig(name="cifar10_c"), 32))
    assert len(whole.domains) == 16
    assert sum(len(domain.train) for domain in whole.domains) == 50_000
    assert {len(domain.test) for domain in whole.domains} == {10_000}
