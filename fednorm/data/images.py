"""From the bytes of an image file to 8-bit RGB: what a file says about its pixels is honoured, or refused by name.

Files are read as Hugging Face's ``datasets.Image`` reads them, by Pillow, with the orientation of their EXIF data
applied. What Pillow's own conversion to RGB would destroy is converted here:

* **Depth.** Grey levels of more than 8 bits are scaled by the range of their bit depth, ``255 v / (2^bits - 1)``, and
  floating-point grey levels, which must lie in [0, 1], by 255; both are rounded. TIFF's "zero is white" is honoured.
  Of 16-bit colours Pillow gives the upper 8 bits.
* **Transparency**, be it a channel, a colour or a palette's, is composed on white: ``(a v + (255 - a) 255) / 255``.
  Where the picture would vanish on white (white ink that stands in the alpha channel alone), it is composed on black.
* **Refused**, because any answer would be a guess: several frames, integers of 32 bits or with a sign, floating-point
  values outside [0, 1], deep images so dark that at 8 bits nothing would be left, wholly transparent pictures.

Only PNG, JPEG, WebP, BMP, TIFF and GIF are ever opened, so no file reaches an interpreter such as Ghostscript, and
images of more than :data:`MAX_PIXELS` pixels are refused by their header, before a pixel is decoded.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from fednorm.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""Pillow's names of the formats that are opened; no other decoder sees a file."""

MAX_PIXELS = 8192 * 8192
"""Most pixels of an image; 200 MB as RGB."""

_EXPECTED = "a whole PNG, JPEG, WebP, BMP, TIFF or GIF file"
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_WHITE, _BLACK = 255, 0
_FEW_LEVELS = 16
"""Grey levels, of 256, below which a picture counts as lost."""


class _UnfitError(Exception):
    """Why an image is refused; the caller knows where it came from."""


@dataclass(frozen=True)
class _Samples:
    """What a file says about its samples that Pillow's mode does not.

    Attributes:
        bits: Bits a sample.
        signed: Whether samples are integers with a sign.
        zero_is_white: Whether zero is white where Pillow does not invert it itself.
    """

    bits: int = 8
    signed: bool = False
    zero_is_white: bool = False


def decode(content: bytes, where: str) -> Image.Image:
    """Decode an image file.

    Args:
        content: The whole file.
        where: The file and row it came from, for an error.

    Returns:
        The upright image, mode ``RGB``.

    Raises:
        DataError: The bytes are no image of :data:`FORMATS`, are damaged, or hold an image that is refused (see the
            module's description).
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about what is decided here (sizes, palettes) or does not matter (odd metadata).
            warnings.simplefilter("ignore")
            return _as_rgb(*_open(content))
    except _UnfitError as error:
        raise DataError(f"{where}: {error}") from None
    except UnidentifiedImageError as error:
        raise DataError(
            f"{where}: the image cannot be decoded: expected {_EXPECTED} of a kind that Pillow reads, got "
            f"{len(content)} bytes that begin with {content[:8]!r}. Convert or replace it."
        ) from error
    except Image.DecompressionBombError as error:
        number = re.search(r"\d+", str(error))
        size = f"{int(number[0]):,} pixels" if number else "too many pixels"
        raise DataError(f"{where}: {_too_large(size)}") from error
    except Exception as error:
        # Pillow's decoders raise whatever the damage leads them to, from EOFError to TypeError.
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{where}: the image cannot be decoded ({reason}). Expected {_EXPECTED}; got {len(content)} bytes. "
            "Remove or replace it."
        ) from error


def as_rgb(image: Image.Image, where: str) -> Image.Image:
    """Return an image that is already decoded as :func:`decode` returns it: mode ``RGB``, nothing lost unsaid.

    Args:
        image: The image as Pillow, or whoever made it, left it; it is not turned upright.
        where: What it is called in an error.

    Raises:
        DataError: It is refused, or its pixels cannot be read.
    """
    bits = 16 if image.mode.startswith("I;16") else 32 if image.mode == "I" else 8
    try:
        image.load()
        return _as_rgb(image, _Samples(bits))
    except _UnfitError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # a file that Pillow reads only now
        reason = str(error) or type(error).__name__
        raise DataError(f"{where}: the image cannot be decoded ({reason}). Remove or replace it.") from error


def _open(content: bytes) -> tuple[Image.Image, _Samples]:
    """Return the upright image as Pillow decodes it, and what its samples are."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _UnfitError(_too_large(f"{width} x {height} pixels"))
    frames = getattr(image, "n_frames", 1)
    # What follows the first picture of a JPEG (cameras' "MPO") is a preview, a depth map or another eye's view.
    if frames > 1 and image.format != "MPO":
        raise _UnfitError(
            f"the image ({image.format}) has {frames} frames, and which of them is meant is not said. Store each "
            "frame that is wanted as an image of its own."
        )
    image.load()
    samples = _samples(image, content)
    return _upright(image), samples


def _too_large(size: str) -> str:
    return f"the image has {size}; most are {MAX_PIXELS:,} (8192 x 8192). Store it smaller."


def _samples(image: Image.Image, content: bytes) -> _Samples:
    if image.format == "PNG":
        return _Samples(bits=content[24])  # IHDR is always the first chunk
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        bits, form = (np.ravel(tags.get(key, 1))[0] for key in (258, 339))  # BitsPerSample, SampleFormat
        return _Samples(int(bits), signed=form == 2, zero_is_white=tags.get(262) == 0)
    return _Samples()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Metadata that cannot be read give no orientation; the pixels are whole.
        return image


def _as_rgb(image: Image.Image, samples: _Samples) -> Image.Image:
    if samples.signed:
        raise _UnfitError(
            f"the image holds {samples.bits}-bit integers with a sign, which are no brightness. Store it as unsigned "
            "8 or 16 bits."
        )
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _grey(image, samples)
        if not isinstance(key, int):
            return grey.convert("RGB")
        visible = Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
        return _composed(Image.merge("RGBA", (grey, grey, grey, visible)))
    if image.mode in _ALPHA_MODES or key is not None:
        rgb = _composed(_as_rgba(image, samples, key))
    else:
        rgb = image.convert("RGB")
    if samples.bits > 8 and _brightest(rgb) < _FEW_LEVELS:
        raise _UnfitError(_too_dark(samples.bits))
    return rgb


def _grey(image: Image.Image, samples: _Samples) -> Image.Image:
    """Scale grey levels of more than 8 bits to 8, mode ``L``."""
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        # Not-a-number fails both comparisons; a last bit above 1 is rounding.
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise _UnfitError(
                f"the image holds floating-point values from {low:g} to {high:g}; expected 0 to 1, from black to "
                "white. Scale it to [0, 1] or store it as 8 or 16 bits."
            )
        scaled = np.clip(values, 0, 1).astype(np.float32) * np.float32(255)
    elif samples.bits > 16:
        raise _UnfitError(
            f"the image holds {samples.bits}-bit integers, of which no value is known to be white. Store it as 8 or 16 "
            "bits."
        )
    else:
        top, brightest = 2**samples.bits - 1, int(values.max())
        if brightest * _FEW_LEVELS < top and len(np.unique(values)) > _FEW_LEVELS:
            raise _UnfitError(_too_dark(samples.bits, brightest))
        scaled = values.astype(np.float32) * np.float32(255 / top)
    levels: npt.NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
    return Image.fromarray(255 - levels if samples.zero_is_white else levels)


def _too_dark(bits: int, brightest: int | None = None) -> str:
    reach = "a 16th" if brightest is None else str(brightest)
    return (
        f"the image has {bits} bits a sample, of whose {2**bits - 1} its values reach {reach} at most: at 8 bits fewer "
        f"than {_FEW_LEVELS} of 256 levels would be left. Scale its values to the whole range."
    )


def _as_rgba(image: Image.Image, samples: _Samples, key: Any) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("L", "RGB") and key is not None:
        if image.mode == "RGB" and samples.bits > 8:
            raise _UnfitError(
                f"the image has {samples.bits} bits a sample and one transparent colour, which Pillow cannot tell from "
                "its neighbours. Store it as 8 bits, or with an alpha channel."
            )
        # A PNG file gives the transparent colour in its own samples, of 1 to 8 bits, Pillow's pixels have 8.
        top = 2**samples.bits - 1
        levels = [(value & top) * 255 // top for value in np.ravel(key).tolist()]
        image.info["transparency"] = levels[0] if image.mode == "L" else tuple(levels)
    return image.convert("RGBA")


def _composed(image: Image.Image) -> Image.Image:
    """Compose an image on white, or on black where it would vanish on white."""
    lowest, highest = _extrema(image.getchannel("A"))
    if lowest == 255:
        return image.convert("RGB")
    if highest == 0 and _contrast(image.convert("RGB")) > 0:
        raise _UnfitError(
            "every pixel of the image is transparent, though their colours differ. Drop its alpha channel, or replace "
            "it."
        )
    white, black = (_on(level, image) for level in (_WHITE, _BLACK))
    return black if _contrast(white) < _FEW_LEVELS <= _contrast(black) else white


def _on(level: int, image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, (level, level, level, 255)), image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    """Return the largest difference of two pixels in a channel."""
    return max(high - low for low, high in map(_extrema, image.split()))


def _extrema(channel: Image.Image) -> tuple[int, int]:
    low, high = channel.getextrema()
    return int(low), int(high)  # type: ignore[arg-type]


def _brightest(image: Image.Image) -> int:
    return max(high for _, high in map(_extrema, image.split()))
