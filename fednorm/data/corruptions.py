"""CIFAR-10-C's corruptions, computed: 12 of its 15 and 3 of its 4 extra ones, at five severities, on images of 32 x 32.

Hendrycks, Dietterich. Benchmarking Neural Network Robustness to Common Corruptions and Perturbations. ICLR 2019.
https://arxiv.org/abs/1903.12261. Formulas and constants are those of the script that made CIFAR-10-C, which are smaller
than ImageNet-C's. Random numbers come from the generator that is passed, so pixels of the noises differ from the
published files, which were drawn once without a seed; their distribution is the same.

Where we differ from the script: *elastic_transform* interpolates its affine map exactly, OpenCV in steps of 1/32 pixel.
Where the script surprises and we follow: *glass_blur* was meant to swap pixels and copies one onto the other; results
are cut to whole numbers, not rounded.

Left out (:data:`LEFT_OUT`) is what takes more than NumPy, SciPy and Pillow: *motion_blur* and *snow* (ImageMagick's
motion blur), *frost* (six photographs) and *spatter* (OpenCV's edge and distance transforms).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fednorm.errors import ConfigError

Floats = npt.NDArray[Any]
"""Images in [0, 1], shape (N, 32, 32, 3)."""
Bytes = npt.NDArray[np.uint8]

SIZE = 32
SEVERITIES = (1, 2, 3, 4, 5)

LEFT_OUT: Mapping[str, str] = {
    "motion_blur": "it is ImageMagick's motion blur",
    "snow": "it takes ImageMagick's motion blur",
    "frost": "it is laid over six photographs of frost, which are not ours",
    "spatter": "it takes OpenCV's edge detection and distance transform",
}
"""Corruptions of CIFAR-10-C that are not computed, and why."""


def corrupt(images: Bytes, name: str, severity: int, rng: np.random.Generator) -> Bytes:
    """Return corrupted images.

    Args:
        images: uint8, shape (N, 32, 32, 3).
        name: A key of :data:`CORRUPTIONS`.
        severity: 1 (least) to 5.
        rng: What random corruptions draw from.

    Returns:
        uint8, of the same shape.

    Raises:
        ConfigError: There is no such corruption or severity, or the images have another shape.
    """
    if name not in CORRUPTIONS:
        reason = f": {LEFT_OUT[name]}" if name in LEFT_OUT else ""
        raise ConfigError(f"Corruption {name!r} is not computed{reason}. There are {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise ConfigError(f"A corruption's severity is 1 to 5; got {severity}.")
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ConfigError(f"Corruptions are of uint8 images of 32 x 32 x 3; got {images.dtype} of {images.shape[1:]}.")
    corrupted = CORRUPTIONS[name](images, severity, rng)
    whole = corrupted.dtype == np.uint8
    cut: Bytes = corrupted if whole else (np.clip(corrupted, 0, 1) * 255).astype(np.uint8)
    return cut


def _gaussian_noise(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """``x + N(0, c^2)``."""
    c = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images / 255.0 + rng.normal(scale=c, size=images.shape)


def _shot_noise(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """``Poisson(c x) / c``."""
    c = (500, 250, 100, 75, 50)[severity - 1]
    noisy: Floats = rng.poisson(images / 255.0 * c) / c
    return noisy


def _impulse_noise(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """Each number, with probability c, becomes 0 or 1, either with probability one half."""
    c = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    flipped, salted = rng.random(images.shape) <= c, rng.random(images.shape) <= 0.5
    return np.where(flipped, salted.astype(float), images / 255.0)


def _speckle_noise(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """``x + x N(0, c^2)``."""
    c = (0.06, 0.1, 0.12, 0.16, 0.2)[severity - 1]
    x = images / 255.0
    return x + x * rng.normal(scale=c, size=x.shape)


def _gaussian_blur(images: Bytes, severity: int, _: np.random.Generator) -> Floats:
    return _blurred(images / 255.0, (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1])


def _glass_blur(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """Blur, put a near pixel in the place of each, from the lower right to the upper left, and blur again."""
    sigma, reach, times = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[severity - 1]
    x = (_blurred(images / 255.0, sigma) * 255).astype(np.uint8)
    every = np.arange(len(x))
    for _ in range(times):
        for row in range(SIZE - reach, reach, -1):
            for column in range(SIZE - reach, reach, -1):
                right, down = rng.integers(-reach, reach, size=(2, len(x)))
                x[:, row, column] = x[every, row + down, column + right]
    return _blurred(x / 255.0, sigma)


def _defocus_blur(images: Bytes, severity: int, _: np.random.Generator) -> Floats:
    """Correlation with an antialiased disk; beyond the border the image is mirrored about its last pixel."""
    from scipy import ndimage

    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    return np.asarray(
        ndimage.correlate(images / 255.0, disk(radius, alias)[None, :, :, None], mode="mirror"), dtype=np.float64
    )


def disk(radius: float, alias: float) -> Floats:
    """Return a disk on 17 x 17 pixels of sum 1, smoothed by a Gaussian of std ``alias`` on 3 x 3 pixels."""
    from scipy import ndimage

    places = np.arange(-8, 9)
    sharp = ((places[:, None] ** 2 + places[None, :] ** 2) <= radius**2).astype(np.float64)
    weights = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * alias**2))
    weights /= weights.sum()
    kernel = weights[:, None] * weights[None, :]
    return np.asarray(ndimage.correlate(sharp / sharp.sum(), kernel, mode="mirror"))


def _zoom_blur(images: Bytes, severity: int, _: np.random.Generator) -> Floats:
    """The mean of the image and of it enlarged by factors up to 1.05 (severity 1) or 1.25 (severity 5)."""
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    whole = np.eye(SIZE * SIZE)
    for factor in factors:
        drawn = enlarging(float(factor))
        whole += np.kron(drawn, drawn)
    x = (images / 255.0).reshape(-1, SIZE * SIZE, 3)
    total = np.tensordot(whole, x, axes=(1, 1)).transpose(1, 0, 2)
    return np.asarray(total.reshape(images.shape) / (len(factors) + 1))


def enlarging(factor: float) -> Floats:
    """Return the matrix, 32 x 32, that draws the middle of a column of pixels up to 32 by ``factor``, linearly.

    Columns and rows are drawn up each for itself, as ``scipy.ndimage.zoom`` of order 1 does, whose matrix it is.
    """
    from scipy import ndimage

    kept = int(np.ceil(SIZE / factor))
    start = (SIZE - kept) // 2
    drawn = ndimage.zoom(np.eye(SIZE)[start : start + kept], (factor, 1), order=1)
    trim = (len(drawn) - SIZE) // 2
    return np.asarray(drawn[trim : trim + SIZE])


def _fog(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """``(x + c f) m / (m + c)``: a plasma fractal f in [0, 1] is added, and the image's maximum m stays."""
    c, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    x = images / 255.0
    top = x.max(axis=(1, 2, 3), keepdims=True)
    return np.asarray((x + c * plasma(len(x), SIZE, decay, rng)[..., None]) * top / (top + c))


def plasma(count: int, size: int, decay: float, rng: np.random.Generator) -> Floats:
    """Return plasma fractals by the diamond-square algorithm on a torus, each in [0, 1].

    Args:
        count: N.
        size: Their height and width, a power of two.
        decay: By what the noise is divided as the grid becomes finer by half.
        rng: What is drawn from.

    Returns:
        Shape (N, size, size).
    """
    field = np.zeros((count, size, size))
    step, wobble = size, 100.0

    def noisy_mean(total: Floats) -> Floats:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        total = corners + np.roll(corners, -1, axis=1)
        total = total + np.roll(total, -1, axis=2)
        field[:, half::step, half::step] = noisy_mean(total)
        middles, corners = field[:, half::step, half::step], field[:, ::step, ::step]
        rows = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        field[:, ::step, half::step] = noisy_mean(rows)
        columns = middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        field[:, half::step, ::step] = noisy_mean(columns)
        step, wobble = half, wobble / decay
    field -= field.min(axis=(1, 2), keepdims=True)
    return np.asarray(field / field.max(axis=(1, 2), keepdims=True))


def _brightness(images: Bytes, severity: int, _: np.random.Generator) -> Floats:
    """HSV's value plus c."""
    c = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    return _in_hsv(images, 2, lambda value: value + c)


def _saturate(images: Bytes, severity: int, _: np.random.Generator) -> Floats:
    """HSV's saturation times c, plus d."""
    c, d = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    return _in_hsv(images, 1, lambda saturation: saturation * c + d)


def _in_hsv(images: Bytes, channel: int, change: Callable[[Floats], Floats]) -> Floats:
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(images / 255.0)
    hsv[..., channel] = np.clip(change(hsv[..., channel]), 0, 1)
    return np.asarray(hsv_to_rgb(hsv))


def _contrast(images: Bytes, severity: int, _: np.random.Generator) -> Floats:
    """``(x - m) c + m``, m the mean of each channel of the image."""
    c = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    x = images / 255.0
    mean = x.mean(axis=(1, 2), keepdims=True)
    return np.asarray((x - mean) * c + mean)


def _elastic_transform(images: Bytes, severity: int, rng: np.random.Generator) -> Floats:
    """A random affine map, then a smooth random displacement of every pixel."""
    amount, sigma, corner = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    x = (images / 255.0).astype(np.float32)
    return np.stack([_stretched(image, amount * SIZE, sigma * SIZE, corner * SIZE, rng) for image in x])


def _stretched(image: Floats, amount: float, sigma: float, corner: float, rng: np.random.Generator) -> Floats:
    from scipy import ndimage

    middle, third = SIZE // 2, SIZE // 3
    points = np.array([[middle + third] * 2, [middle + third, middle - third], [middle - third] * 2], dtype=np.float64)
    moved = points + rng.uniform(-corner, corner, points.shape)
    # M maps (x, y, 1) of the image to where it goes; what comes to a pixel is found by its inverse.
    forth = np.linalg.solve(np.column_stack([points, np.ones(3)]), moved).T
    back = np.linalg.inv(np.vstack([forth, [0, 0, 1]]))
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    from_x, from_y, _ = back @ np.stack([columns.ravel(), rows.ravel(), np.ones(SIZE * SIZE)])
    image = _sampled(image, from_y, from_x, "mirror")
    shift = [
        ndimage.gaussian_filter(rng.uniform(-1, 1, (SIZE, SIZE)), sigma, mode="reflect", truncate=3) * amount
        for _ in range(2)
    ]
    return _sampled(image, (rows + shift[1]).ravel(), (columns + shift[0]).ravel(), "reflect")


def _sampled(image: Floats, rows: Floats, columns: Floats, mode: str) -> Floats:
    """Return an image's values at places between its pixels, linearly."""
    from scipy import ndimage

    channels = [ndimage.map_coordinates(image[..., k], (rows, columns), order=1, mode=mode) for k in range(3)]
    return np.stack(channels, axis=-1).reshape(image.shape)


def _pixelate(images: Bytes, severity: int, _: np.random.Generator) -> Bytes:
    """Drawn down and up again, by the means of boxes."""
    small = int(SIZE * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    box = Image.Resampling.BOX
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((small, small), box).resize((SIZE, SIZE), box)) for image in images]
    )


def _jpeg_compression(images: Bytes, severity: int, _: np.random.Generator) -> Bytes:
    quality = (80, 65, 58, 50, 40)[severity - 1]
    out = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(buffer)))
    return np.stack(out)


def _blurred(x: Floats, sigma: float) -> Floats:
    """Gaussian blur of each channel; beyond the border the last pixel goes on."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest", truncate=4))


CORRUPTIONS: Mapping[str, Callable[[Bytes, int, np.random.Generator], Any]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
}
"""The corruptions by their published names: noises, blurs, weather, digital; the last three are the extra ones."""
