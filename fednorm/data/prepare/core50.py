"""CORe50: 50 objects in eleven sessions. Lomonaco, Maltoni, CORe50: a New Dataset and Benchmark, CoRL 2017.

https://arxiv.org/abs/1705.03550. Images are called ``s1/o1/C_01_01_000.png`` after their session and object, five
objects a category; sessions 3, 7 and 10 are for testing, the others for training. A training image's domain is its
session, a test image's ``test``: benchmark ``core50`` tests each session on all of them, as every published protocol
does. The images come as PNG files or as one array, ``core50_imgs.npz``, with their names in ``paths.pkl``: of that
pickle nothing but a list of texts is accepted. MD5 sums are those that Avalanche publishes.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from fednorm.data.prepare.files import Files
from fednorm.data.prepare.recipe import Archive, Images, Recipe, Row, Wanted
from fednorm.errors import DataError

CATEGORIES = (
    "plug_adapter",
    "mobile_phone",
    "scissor",
    "light_bulb",
    "can",
    "glass",
    "ball",
    "marker",
    "cup",
    "remote_control",
)
CLASSES = tuple(f"{category}_{number}" for category in CATEGORIES for number in range(1, 6))
TEST_SESSIONS = (3, 7, 10)
SESSIONS = 11

_PATH = re.compile(r"(?:.*/)?s(\d{1,2})/o(\d{1,2})/C_\d+_\d+_(\d+)\.png")
_ARRAY, _PATHS = "core50_imgs.npz", "paths.pkl"


def _images(files: Files, wanted: Wanted) -> Iterator[Images]:
    del wanted  # all of it
    matches = [(match, path) for path in files if (match := _PATH.fullmatch(path))]
    if not matches and not any(path.rpartition("/")[2] == _ARRAY for path in files):
        raise DataError(f"{files.place} holds neither sN/oN/C_*.png nor {_ARRAY}; it holds {files.there()}")
    # Two sizes side by side would be the same images twice over.
    sizes = sorted({path[: match.start(1) - 1] for match, path in matches})
    if len(sizes) > 1:
        raise DataError(f"{files.place} holds the images in several places: {', '.join(sizes)}. Keep one of them")
    yield Images("core50", CLASSES, _files(matches) if matches else _array(files))


def _files(matches: list[tuple[re.Match[str], str]]) -> Iterator[Row]:
    for match, path in sorted(matches, key=lambda entry: tuple(map(int, entry[0].groups()))):
        yield _row(match, path)


def _row(match: re.Match[str], image: Any) -> Row:
    session, thing = int(match[1]), int(match[2])
    if not (1 <= session <= SESSIONS and 1 <= thing <= len(CLASSES)):
        raise DataError(f"{match[0]}: session {session} of object {thing}; there are {SESSIONS} of {len(CLASSES)}")
    if session in TEST_SESSIONS:
        return Row(image, thing - 1, "test", "test")
    return Row(image, thing - 1, "train", f"s{session:02d}")


def _array(files: Files) -> Iterator[Row]:
    """Yield the rows of the one array, read image by image: it is 8 GB."""
    paths = _texts(files)
    with files.opened(files.root(_ARRAY) + _ARRAY) as packed:
        try:
            archive = np.load(packed, allow_pickle=False)
            member = archive.zip.open("x.npy")
            shape = _shape(member)
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{files.place}: {_ARRAY} holds no array 'x' of images ({error})") from error
        if len(shape) != 4 or shape[3] != 3 or shape[0] != len(paths):
            raise DataError(f"{files.place}: {_ARRAY} has shape {shape}, for {len(paths)} names in {_PATHS}")
        size = int(np.prod(shape[1:]))
        for path in paths:
            match = _PATH.fullmatch(path)
            content = member.read(size)
            if match is None or len(content) < size:
                raise DataError(f"{files.place}: {path!r} of {_PATHS} is no name of an image, or {_ARRAY} ends early")
            yield _row(match, np.frombuffer(content, dtype=np.uint8).reshape(shape[1:]))


def _shape(member: IO[bytes]) -> tuple[int, ...]:
    """Return the shape of an array of bytes whose header is read."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if fortran or dtype != np.uint8:
        raise ValueError(f"it is {dtype}, in {'Fortran' if fortran else 'C'} order")
    return tuple(shape)


class _Texts(pickle.Unpickler):
    """Reads lists and texts, and refuses everything that a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse.

        Raises:
            UnpicklingError: Always.
        """
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _texts(files: Files) -> list[str]:
    content = files.read(_PATHS, files.root(_PATHS))
    try:
        paths = _Texts(io.BytesIO(content)).load()
    except Exception as error:  # whatever the damage leads it to
        raise DataError(f"{files.place}: {_PATHS} is no list of texts ({error})") from error
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{files.place}: {_PATHS} is no list of texts")
    return paths


RECIPE = Recipe(
    name="core50",
    title="CORe50",
    source="https://vlomonaco.github.io/core50",
    archives=(
        Archive("core50_128x128.zip", "745f3373fed08d69343f1058ee559e13"),
        Archive("core50_32x32.zip", "d89d34cdc0281fa84074430e9a22b728"),
        Archive(_ARRAY, "3689d65d0a1c760b87821b114c8c4c6c"),
        Archive(_PATHS, "b568f86998849184df3ec3465290f1b0"),
    ),
    images=_images,
    folders=("core50",),
    layout="core50_128x128/sN/oN/C_*.png, or core50_imgs.npz and paths.pkl",
)
