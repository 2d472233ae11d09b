"""Images and labels that a program holds in memory: what they are is told by their shape and type, or refused by name.

Images are ``uint8``, or floating point in [0, 1], which is scaled by 255 and rounded; grey (N, H, W), or with one or
three channels, last (N, H, W, 3) as NumPy and Pillow have them or first (N, 3, H, W) as PyTorch has them. Labels are
whole numbers 0 to K - 1, or the classes' names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fednorm.data.cache import Pixels
from fednorm.data.classes import Rows, in_natural_order, some
from fednorm.data.images import as_rgb, decode
from fednorm.data.source import to_square
from fednorm.errors import DataError
from fednorm.memory import require_memory

CHANNELS = (1, 3)
"""How many channels an image may have."""

LAYOUTS = "(N, H, W), (N, H, W, 3) or (N, 3, H, W)"
"""The shapes of several images, for errors."""

_AT_A_TIME = 1024
"""Images that are scaled or hashed at a time, so that no copy of the whole array is made."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory.

    Attributes:
        kind: What they were given as: ``uint8`` or ``float``.
        blocks: Images of one size each, uint8, shape (n, C, H, W) with C of 1 or 3; in order.
    """

    kind: str
    blocks: tuple[Pixels, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(len(block) for block in self.blocks)

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Return every height and width."""
        return {(block.shape[2], block.shape[3]) for block in self.blocks}

    def digest(self) -> str:
        """Return SHA-256 of the pixels and sizes, as hexadecimal digits."""
        digest = hashlib.sha256()
        for block in self.blocks:
            digest.update(f"{block.shape}".encode())
            for start in range(0, len(block), _AT_A_TIME):
                digest.update(np.ascontiguousarray(block[start : start + _AT_A_TIME]).tobytes())
        return digest.hexdigest()

    def write(self, out: Pixels) -> None:
        """Write the images into an array, uint8, shape (N, 3, S, S): grey in three channels, other sizes resized."""
        size, start = out.shape[2], 0
        for block in self.blocks:
            part = out[start : start + len(block)]
            start += len(block)
            if block.shape[2:] == (size, size):
                part[:] = block
                continue
            for place, image in enumerate(block):
                part[place] = to_square(_picture(image), size)


def joined(parts: Sequence[Images], size: int) -> Pixels:
    """Return the images of several parts as one array, uint8, shape (N, 3, size, size).

    Raises:
        DataError: It would not fit into memory.
    """
    count = sum(map(len, parts))
    require_memory(
        3 * count * size * size,
        f"{count:,} images of {size} x {size} pixels",
        "Choose a smaller data.image_size, or fewer images.",
        DataError,
    )
    out: Pixels = np.empty((count, 3, size, size), dtype=np.uint8)
    start = 0
    for part in parts:
        part.write(out[start : start + len(part)])
        start += len(part)
    return out


def _picture(image: Pixels) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


# Images ---------------------------------------------------------------------------------------------------------------


def read_images(given: Any, where: str) -> Images:
    """Return images that were given as one array or tensor, or as a sequence of images.

    Args:
        given: An array or tensor of several images, or a list of single ones, which may differ in size.
        where: What they are called in an error.

    Raises:
        DataError: Their shape, type or range leaves open what they are.
    """
    if isinstance(given, list | tuple):
        return together([read_image(image, f"{where}, row {row}") for row, image in enumerate(given)], where)
    array = _as_array(given, where)
    return _read(array, array, where)


def read_image(given: Any, where: str) -> Images:
    """Return one image: a Pillow image, an array or tensor of shape (H, W), (H, W, 3) or (3, H, W), or an image file.

    A file is given as its bytes, or as Hugging Face's ``{"bytes": ..., "path": ...}``.

    Raises:
        DataError: It is something else, or is refused.
    """
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        given = given["bytes"]
    if isinstance(given, bytes):
        given = decode(given, where)
    if isinstance(given, Image.Image):
        rgb = np.asarray(as_rgb(given, where))
        return Images("uint8", (rgb.transpose(2, 0, 1)[None],))
    array = _as_array(given, where)
    if array.ndim not in (2, 3):
        raise DataError(
            f"{where}: an image has shape {array.shape}; expected (H, W), (H, W, 3) or (3, H, W). Give each item one "
            "image."
        )
    return _read(array[None], array, where)


def together(images: Sequence[Images], where: str) -> Images:
    """Return single images as one sequence.

    Raises:
        DataError: Some are ``uint8`` and some floating point.
    """
    kinds = [image.kind for image in images]
    if len(set(kinds)) > 1:
        row = next(row for row, kind in enumerate(kinds) if kind != kinds[0])
        raise DataError(
            f"{where}: image 0 is {kinds[0]} and image {row} is {kinds[row]}. Give all of them as uint8, or all as "
            "floating point in [0, 1]."
        )
    return Images(kinds[0] if kinds else "uint8", tuple(block for image in images for block in image.blocks))


def _as_array(given: Any, where: str) -> npt.NDArray[Any]:
    try:
        if isinstance(given, Tensor):
            tensor = given.detach().cpu()
            return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
        array = np.asarray(given) if hasattr(given, "__array__") else None
    except Exception as error:
        raise DataError(f"{where}: the images cannot be read as an array ({error}). Give a NumPy array.") from error
    if array is None:
        raise DataError(
            f"{where}: expected images as a NumPy array, a PyTorch tensor or Pillow images; got a "
            f"{type(given).__name__}. Load them first."
        )
    return array


def _read(array: npt.NDArray[Any], given: npt.NDArray[Any], where: str) -> Images:
    first = _channels_first(array, given, where)
    if 0 in first.shape[1:]:
        raise DataError(f"{where}: images of shape {given.shape} have no pixels.")
    if array.dtype == np.uint8:
        return Images("uint8", (first,))
    if array.dtype.kind == "f":
        return Images("float", (_scaled(first, where),))
    raise DataError(
        f"{where}: images of type {array.dtype} leave open which value is white; expected uint8 from 0 to 255, or "
        "floating point from 0 to 1. Convert them: images.astype('uint8') if they are 0 to 255."
    )


def _channels_first(array: npt.NDArray[Any], given: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Return a view of images, shape (N, C, H, W)."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4:
        first, last = array.shape[1] in CHANNELS, array.shape[3] in CHANNELS
        if first and last:
            raise DataError(
                f"{where}: shape {given.shape} may have its channels first or last, and which of the two is not said. "
                "Give grey images as (N, H, W), or larger ones."
            )
        if first:
            return array
        if last:
            return array.transpose(0, 3, 1, 2)
    hint = "Give one of these shapes."
    if array.ndim == 2:
        hint = "Flattened images need their height and width back: images.reshape(-1, H, W)."
    elif array.ndim == 4 and 4 in (array.shape[1], array.shape[3]):
        hint = "Compose the fourth channel, transparency, on a background and drop it."
    raise DataError(f"{where}: images have shape {given.shape}; expected {LAYOUTS}. {hint}")


def _scaled(images: npt.NDArray[Any], where: str) -> Pixels:
    """Return floating-point images in [0, 1] as uint8: ``round(255 x)``."""
    out: Pixels = np.empty(images.shape, dtype=np.uint8)
    for start in range(0, len(images), _AT_A_TIME):
        part = images[start : start + _AT_A_TIME]
        low, high = float(part.min()), float(part.max())
        # Not-a-number fails both comparisons; a last bit above 1 is rounding.
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            hint = "Divide them by 255, or give them as uint8." if low >= 0 and high <= 255 else "Scale them to [0, 1]."
            if low < 0:
                hint = "Undo their normalization (mean, std): fednorm scales pixels itself."
            if not (np.isfinite(low) and np.isfinite(high)):
                hint = "Replace the values that are no finite numbers."
            raise DataError(
                f"{where}: floating-point images must be in [0, 1]; they go from {low:g} to {high:g}. {hint}"
            )
        out[start : start + _AT_A_TIME] = np.rint(np.clip(part, 0, 1).astype(np.float32) * np.float32(255))
    return out


# Labels ---------------------------------------------------------------------------------------------------------------


def read_labels(given: Any, where: str) -> tuple[Rows, tuple[str, ...]]:
    """Return labels as int64, shape (N,), and the classes' names where labels are names, else nothing.

    Args:
        given: An array, tensor or sequence of whole numbers from 0, or of texts.
        where: What they are called in an error.

    Raises:
        DataError: They are something else, or one is negative.
    """
    array = _label_array(given, where)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        hint = "One-hot labels become numbers with labels.argmax(1)." if array.ndim == 2 else "Give one label an image."
        raise DataError(f"{where}: labels have shape {array.shape}; expected (N,). {hint}")
    if array.dtype.kind in "UT" or (array.dtype == object and len(array) and all(isinstance(x, str) for x in array)):
        texts = [str(text) for text in array]
        names = in_natural_order(texts)
        number = {name: k for k, name in enumerate(names)}
        return np.array([number[text] for text in texts], dtype=np.int64), names
    if array.dtype == bool:
        array = array.astype(np.int64)
    if len(array) and array.dtype.kind not in "iu":
        row = next((row for row, label in enumerate(array) if not isinstance(label, int | np.integer)), 0)
        example = repr(array[row].item() if hasattr(array[row], "item") else array[row])
        raise DataError(
            f"{where}, row {row}: the label is {example[:60]} ({array.dtype}); expected whole numbers 0 to K - 1, or "
            "the classes' names as texts. Convert them: labels.astype('int64')."
        )
    outside = np.flatnonzero((array < 0) | (array > np.iinfo(np.int64).max))
    if len(outside):
        row = int(outside[0])
        hidden = " It stands for a label that is kept secret: take images with labels." if array[row] == -1 else ""
        raise DataError(f"{where}, row {row}: label {array[row]} is outside 0 to K - 1.{hidden}")
    return array.astype(np.int64), ()


def _label_array(given: Any, where: str) -> npt.NDArray[Any]:
    try:
        if isinstance(given, Tensor):
            tensor = given.detach().cpu()
            return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
        if isinstance(given, list | tuple):
            given = [_plain(label) for label in given]
            kinds = {isinstance(label, str) for label in given}
            if len(kinds) > 1:  # NumPy would make texts of the numbers
                row = next(
                    row for row, label in enumerate(given) if isinstance(label, str) != isinstance(given[0], str)
                )
                raise DataError(
                    f"{where}: some labels are texts and some are not: {some([given[0], given[row]], repr)}. Give "
                    "numbers, or names."
                )
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where}: the labels are no array of numbers or texts ({error}). Give one label an image."
        ) from error


def _plain(label: Any) -> Any:
    """Return the number in a tensor or array of one element; anything else as it is."""
    if isinstance(label, np.ndarray) and label.size == 1:
        return label.reshape(-1)[0]
    return label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
