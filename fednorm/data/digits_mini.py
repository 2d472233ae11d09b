"""The embedded benchmark ``digits_mini``: five small digit domains from what installed packages carry.

It exists so that a demonstration and the tests need neither a network nor a data folder. It is a **small stand-in,
never to be reported as Digits-Five**: a few hundred images a domain, three of the domains made from the 1,797 digits
of scikit-learn, two rendered. All images are 28x28x3:

* ``scans``: scikit-learn's handwritten digits (Alpaydin and Kaynak, 8x8 grey levels), enlarged.
* ``photo``: other digits of the same set, as the absolute difference to patches of scikit-learn's two sample
  photographs (the MNIST-M recipe, Ganin and Lempitsky, arXiv 1409.7495).
* ``fonts``: digits set in matplotlib's fonts in random colour, size, place and rotation (the SYN Numbers recipe).
* ``street``: a coloured plate with a digit, halves of other digits at its sides, perspective, blur and noise.
* ``faint``: still other digits of the same set, blurred, of little contrast, dark on light.

No source is used twice: the scans are dealt once to scans, photo and faint and there to train and test; train and test
use different stripes of the photographs and different font files, and each rendered image is drawn for itself. The
generation has a seed of its own, so this is one data set, whatever the seed of a run; the pixels may differ in last
bits between versions of Pillow and FreeType, whose versions are therefore part of the cache's key. The recipes and
sizes were fixed by looking at the images, before any method was trained on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from fednorm.data.cache import Pixels, cached
from fednorm.data.source import Rows, Source, stack
from fednorm.errors import DataError
from fednorm.limits import shown
from fednorm.rng import stream

SIZE = 28
"""Height and width of the images as generated, in pixels."""

MOST_SIZE = 512
"""Largest height and width that they are resized to: there is nothing more to be seen in them."""

GENERATION_SEED = 20240611
"""Seed of the one data set; independent of the seed of a run."""

DOMAINS = ("scans", "photo", "fonts", "street", "faint")
"""The domains, in order."""

NUM_SCANS = 1797
SCAN_DOMAINS = ("scans", "photo", "faint")
SCAN_TRAIN, SCAN_TEST = 400, 199
"""Images of each domain made from scans: 3 x (400 + 199) = 1,797, all there are."""
RENDERED_TRAIN, RENDERED_TEST = 800, 400
"""Images of each rendered domain."""

FONTS: Mapping[tuple[str, bool], tuple[str, ...]] = {
    ("fonts", True): (
        "DejaVuSans",
        "DejaVuSans-BoldOblique",
        "DejaVuSansMono-Oblique",
        "DejaVuSerif-Bold",
        "STIXGeneral",
        "cmr10",
        "cmtt10",
    ),
    ("fonts", False): ("DejaVuSans-Bold", "DejaVuSerif-Italic", "STIXGeneralBol"),
    ("street", True): (
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "STIXGeneralItalic",
        "cmb10",
        "cmss10",
    ),
    ("street", False): ("DejaVuSansMono-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta"),
}
"""The font files (in matplotlib's ``fonts/ttf``) of each rendered domain's (train, True) and (test, False) images."""

_PHOTOS = ("china.jpg", "flower.jpg")
_STRIPES = {True: (0, 1, 3, 4), False: (2, 5)}
"""Which sixths of each photograph's width give the patches of the training images (True) and test images (False)."""

_RECIPE_VERSION = 1

Grey = npt.NDArray[np.float64]
Colour = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What one image is made from, decided before anything is drawn.

    Attributes:
        domain: Its domain.
        train: Whether it is a training image.
        number: Its number in the domain's split; with domain and split it names its random stream.
        label: The digit.
        scan: The row of scikit-learn's digits, or -1 where the digit is rendered.
    """

    domain: str
    train: bool
    number: int
    label: int
    scan: int = -1

    @property
    def rng(self) -> np.random.Generator:
        """The image's own generator."""
        return stream(GENERATION_SEED, "digits_mini", self.domain, "train" if self.train else "test", self.number)


@cache
def plans() -> tuple[Plan, ...]:
    """Return the plan of every image: the training images of all domains in order, then the test images."""
    parts = [*_scan_plans(), *_rendered_plans()]
    return tuple(sorted(parts, key=lambda plan: (not plan.train, DOMAINS.index(plan.domain), plan.number)))


def _scan_plans() -> list[Plan]:
    """Deal the scans, sorted by digit in random order, to the domains in turn: each gets each digit a third."""
    labels = _scans()[1]
    shuffled = stream(GENERATION_SEED, "digits_mini", "scans").permutation(NUM_SCANS)
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    out = []
    for place, domain in enumerate(SCAN_DOMAINS):
        rows = ordered[place :: len(SCAN_DOMAINS)]
        held = np.zeros(len(rows), dtype=bool)
        held[np.arange(SCAN_TEST) * len(rows) // SCAN_TEST] = True
        for train, part in ((True, rows[~held]), (False, rows[held])):
            out += [Plan(domain, train, i, int(labels[row]), int(row)) for i, row in enumerate(part)]
    return out


def _rendered_plans() -> list[Plan]:
    sizes = ((True, RENDERED_TRAIN), (False, RENDERED_TEST))
    return [Plan(domain, train, i, i % 10) for domain in ("fonts", "street") for train, n in sizes for i in range(n)]


def read_digits_mini(image_size: int = SIZE, cache_dir: Path | None = None) -> Source:
    """Return the embedded benchmark, generated at the first call (seconds) and kept as an array.

    Args:
        image_size: S; other sizes than 28 are resized from 28 with Pillow's bilinear filter.
        cache_dir: Where the array is kept (:func:`fednorm.data.cache.cache_folder`).

    Returns:
        The data set with its five domains.

    Raises:
        DataError: A package's sample data is not installed, or the size is beyond :data:`MOST_SIZE`.
    """
    if image_size > MOST_SIZE:
        raise DataError(
            f"digits_mini's images are made with {SIZE} pixels a side and resized to {MOST_SIZE} at most; got "
            f"{shown(image_size)}. Lower data.image_size."
        )
    everything = plans()

    def make() -> Pixels:
        return stack((draw(plan) for plan in everything), len(everything), image_size)

    num_train = sum(plan.train for plan in everything)
    key, shape = [f"image_size={image_size}", *_versions()], (len(everything), 3, image_size, image_size)
    return Source(
        name="digits_mini",
        images=cached(f"digits_mini-{image_size}", key, make, cache_dir, shape=shape),
        labels=np.array([plan.label for plan in everything], dtype=np.int64),
        train=np.arange(num_train, dtype=np.int64),
        test=np.arange(num_train, len(everything), dtype=np.int64),
        files=(("digits_mini", len(everything)),),
        class_names=tuple(str(digit) for digit in range(10)),
        domains=np.array([plan.domain for plan in everything], dtype=np.str_),
    )


@cache
def _versions() -> list[str]:
    packages = [f"{name}={version(name)}" for name in ("pillow", "matplotlib", "scikit-learn", "numpy")]
    return [f"digits_mini={_RECIPE_VERSION}", f"freetype={features.version('freetype2')}", *packages]


def draw(plan: Plan) -> Image.Image:
    """Draw one image, 28x28 RGB."""
    pixels = _RECIPES[plan.domain](plan)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _draw_scan(plan: Plan) -> Colour:
    return _as_colour(255.0 * _scan(plan.scan))


def _draw_photo(plan: Plan) -> Colour:
    return np.abs(_patch(plan) - _as_colour(255.0 * _scan(plan.scan)))


def _draw_faint(plan: Plan) -> Colour:
    rng = plan.rng
    ink = Image.fromarray(np.uint8(np.rint(255 * _scan(plan.scan))))
    ink = ink.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 1.4)))
    paper, contrast = rng.uniform(170, 235), rng.uniform(40, 80)
    grey = paper - contrast * np.asarray(ink, dtype=np.float64) / 255 + rng.normal(0, 4, (SIZE, SIZE))
    return _as_colour(grey)


def _draw_font(plan: Plan) -> Colour:
    rng = plan.rng
    paper, ink = _two_colours(rng)
    mask = _glyph(plan, plan.label, rng.uniform(15, 23), tuple(SIZE / 2 + rng.uniform(-3, 3, 2)))
    mask = mask.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC)
    return _blend(paper, ink, _shrink(mask))


def _draw_street(plan: Plan) -> Colour:
    rng = plan.rng
    plate, ink = _two_colours(rng)
    height = rng.uniform(17, 22)
    middle = SIZE / 2 + rng.uniform(-1.5, 1.5, 2)
    mask = _glyph(plan, plan.label, height, tuple(middle))
    for side in (-1, 1):
        if rng.random() < 0.75:
            beside = (middle[0] + side * height * rng.uniform(0.72, 0.85), middle[1] + rng.uniform(-1, 1))
            other = _glyph(plan, int(rng.integers(10)), height, beside)
            mask.paste(255, (0, 0), other)
    mask = _perspective(mask, rng)
    slope = np.linspace(-1, 1, SIZE)
    light = rng.uniform(-30, 30) * slope[:, None] + rng.uniform(-30, 30) * slope[None, :]
    pixels = _blend(plate, ink, _shrink(mask)) + light[..., None]
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    return np.asarray(picture, dtype=np.float64) + rng.normal(0, rng.uniform(2, 10), (SIZE, SIZE, 3))


def _as_colour(grey: Grey) -> Colour:
    return np.repeat(grey[..., None], 3, axis=2)


def _blend(paper: Colour, ink: Colour, mask: Grey) -> Colour:
    return paper + mask[..., None] * (ink - paper)


def _two_colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Draw two colours until a reader can tell them apart: luma (ITU-R BT.601) at least 70 of 255 apart."""
    while True:
        first, second = rng.uniform(0, 255, (2, 3))
        if abs(float((first - second) @ (0.299, 0.587, 0.114))) >= 70:
            return first, second


def _of_sklearn(*parts: str) -> Path:
    """Return a sample file of scikit-learn's, found without its import, which takes a second.

    Raises:
        DataError: It is not installed.
    """
    package = find_spec("sklearn")
    folders = (package and package.submodule_search_locations) or ()
    for path in (Path(folder, "datasets", *parts) for folder in folders):
        if path.is_file():
            return path
    raise DataError(f"digits_mini needs scikit-learn's sample file {parts[-1]}, which is not installed.")


@cache
def _scans() -> tuple[Grey, Rows]:
    """Return scikit-learn's digits in [0, 1], shape (1797, 8, 8), and their labels: what its ``load_digits`` returns.

    Raises:
        DataError: Its file is not installed, cannot be read, or holds something else.
    """
    path = _of_sklearn("data", "digits.csv.gz")
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is empty is said below
            table = np.loadtxt(path, delimiter=",", dtype=np.int64)  # through gzip, by its name's end
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"digits_mini needs scikit-learn's file {path}, which cannot be read ({error}).") from error
    if table.shape != (NUM_SCANS, 65):
        raise DataError(f"digits_mini needs scikit-learn's {NUM_SCANS} digits; {path} holds a {table.shape} table.")
    return table[:, :-1].reshape(-1, 8, 8) / 16.0, table[:, -1].copy()


def _scan(row: int) -> Grey:
    """Return a scan in [0, 1], enlarged to 24x24 inside a margin of 2 pixels."""
    small = Image.fromarray(np.uint8(np.rint(255 * _scans()[0][row])))
    large = np.asarray(small.resize((SIZE - 4, SIZE - 4), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.pad(large / 255, 2)


@cache
def _photo(name: str) -> Pixels:
    path = _of_sklearn("images", name)
    try:
        with Image.open(path) as photo:
            return np.asarray(photo, dtype=np.uint8)
    except OSError as error:
        raise DataError(
            f"digits_mini needs scikit-learn's photograph {path}, which cannot be read ({error})."
        ) from error


def _patch(plan: Plan) -> Colour:
    """Return a 28x28 patch of a photograph halved in size, from the stripes of the plan's split."""
    rng, side = plan.rng, 2 * SIZE
    photo = _photo(_PHOTOS[int(rng.integers(len(_PHOTOS)))])
    height, width, _ = photo.shape
    stripe = int(rng.choice(_STRIPES[plan.train]))
    left, right = stripe * width // 6, (stripe + 1) * width // 6
    top = int(rng.integers(height - side + 1))
    column = int(rng.integers(left, right - side + 1))
    patch = Image.fromarray(photo[top : top + side, column : column + side]).reduce(2)
    return np.asarray(patch, dtype=np.float64)


@cache
def _font(name: str, height: int) -> ImageFont.FreeTypeFont:
    import matplotlib as mpl

    path = Path(mpl.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    try:
        return ImageFont.truetype(str(path), height, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"digits_mini needs matplotlib's font file {path}, which cannot be read ({error}).") from error


def _glyph(plan: Plan, digit: int, height: float, centre: tuple[float, ...]) -> Image.Image:
    """Draw a digit in a font of the plan's split, ``height`` pixels high, as a mask of twice the size."""
    names = FONTS[plan.domain, plan.train]
    # A digit is about 0.7 em high.
    font = _font(names[plan.number // 10 % len(names)], round(2 * height / 0.7))
    mask = Image.new("L", (2 * SIZE, 2 * SIZE))
    left, top, right, bottom = font.getbbox(str(digit))
    place = (2 * centre[0] - (left + right) / 2, 2 * centre[1] - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(place, str(digit), fill=255, font=font)
    return mask


def _shrink(mask: Image.Image) -> Grey:
    return np.asarray(mask.reduce(2), dtype=np.float64) / 255


def _perspective(mask: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Move the corners by up to 8 per cent of the width (a quadrilateral transform)."""
    side = 2 * SIZE
    corners = np.array([[0, 0], [0, side], [side, side], [side, 0]]) + rng.uniform(-0.08, 0.08, (4, 2)) * side
    return mask.transform((side, side), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC)


_RECIPES: Mapping[str, Callable[[Plan], Colour]] = {
    "scans": _draw_scan,
    "photo": _draw_photo,
    "fonts": _draw_font,
    "street": _draw_street,
    "faint": _draw_faint,
}
