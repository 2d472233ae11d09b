"""Images of every depth, mode, format and orientation against values worked out here in NumPy."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fednorm.data.images import MAX_PIXELS, decode
from fednorm.errors import DataError

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)
SIXTEEN = np.rint(RAMP * 65535).astype(np.uint16)
STROKE = np.zeros((16, 16), np.uint8)
STROKE[4:12, 6:10] = 255


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if form == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = decode(content, "here")
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255.0
    return colour * a + 255 * (1 - a)


def png(width: int, height: int, bits: int, kind: int, rows: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(array: np.ndarray, bits: int, *, photometric: int = 1, sample_format: int = 1, width: int = 0) -> bytes:
    """Write a TIFF file by hand, of a kind that Pillow reads but does not write."""
    height, columns = array.shape
    tags = {
        256: width or columns, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height,
        279: array.nbytes, 339: sample_format,
    }  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + array.tobytes()


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(form: str, options: dict[str, str]) -> None:
    content = encode(Image.fromarray(SIXTEEN), form, **(options if form == "TIFF" else {}))
    np.testing.assert_array_equal(pixels(content), grey(EIGHT))


def test_twelve_bits_are_scaled_by_theirs() -> None:
    values = np.rint(RAMP * 4095).astype(int).reshape(-1, 2)
    first, second = values[:, 0], values[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)
    np.testing.assert_array_equal(pixels(tiff(packed.reshape(16, 24), 12, width=16)), grey(EIGHT))


def test_floats_in_0_to_1_are_scaled_and_others_refused() -> None:
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF")), grey(EIGHT))
    for values in (RAMP * 255, RAMP - 0.5, np.where(RAMP > 0.5, np.nan, RAMP), np.where(RAMP > 0.5, np.inf, RAMP)):
        with pytest.raises(DataError, match=r"here: .* floating-point values from .*; expected 0 to 1"):
            decode(encode(Image.fromarray(values.astype(np.float32)), "TIFF"), "here")


@pytest.mark.parametrize(
    ("array", "bits", "sample_format"),
    [(EIGHT, 8, 1), (SIXTEEN, 16, 1), (RAMP.astype(np.float32), 32, 3)],
)
def test_zero_can_be_white_in_a_tiff_file(array: np.ndarray, bits: int, sample_format: int) -> None:
    content = tiff(array, bits, photometric=0, sample_format=sample_format)
    np.testing.assert_array_equal(pixels(content), 255 - grey(EIGHT))


@pytest.mark.parametrize(
    ("array", "bits", "sample_format", "message"),
    [
        (EIGHT, 8, 2, "8-bit integers with a sign"),
        (SIXTEEN // 2, 16, 2, "16-bit integers with a sign"),
        (EIGHT.astype(np.uint32), 32, 1, "32-bit integers, of which no value is known to be white"),
        (RAMP, 64, 3, "of a kind that Pillow reads"),
    ],
)
def test_samples_that_could_mean_anything_are_refused(
    array: np.ndarray, bits: int, sample_format: int, message: str
) -> None:
    with pytest.raises(DataError, match=f"here: .*{message}"):
        decode(tiff(array, bits, sample_format=sample_format), "here")


def test_twelve_bits_in_sixteen_would_be_black_and_are_refused() -> None:
    with pytest.raises(DataError, match=r"here: .* 65535 its values reach 4095 at most.*Scale its values"):
        decode(encode(Image.fromarray(SIXTEEN // 16), "PNG"), "here")
    colours = struct.pack(">6H", 4095, 0, 99, 0, 1000, 0)
    with pytest.raises(DataError, match="here: the image has 16 bits a sample"):
        decode(png(2, 1, 16, 2, b"\0" + colours), "here")
    assert not pixels(encode(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")).any()


@pytest.mark.parametrize(("level", "paper"), [(0, 255), (128, 255), (255, 0)])
@pytest.mark.parametrize(("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_ink_in_the_alpha_channel_alone_is_seen(level: int, paper: int, mode: str, form: str) -> None:
    ink = Image.fromarray(np.dstack([np.full((16, 16, 3), level, np.uint8), STROKE])).convert(mode)
    np.testing.assert_array_equal(pixels(encode(ink, form)), grey(np.where(STROKE > 0, level, paper)))


def test_a_transparent_picture_is_refused_and_an_empty_one_is_white() -> None:
    assert (pixels(encode(Image.new("RGBA", (4, 4)), "PNG")) == 255).all()
    with pytest.raises(DataError, match="here: every pixel of the image is transparent"):
        decode(encode(Image.fromarray(np.dstack([grey(EIGHT), np.zeros_like(EIGHT)])), "PNG"), "here")


def test_transparent_colours_and_palettes() -> None:
    key = encode(Image.fromarray(EIGHT), "PNG", transparency=7)
    np.testing.assert_array_equal(pixels(key), grey(np.where(EIGHT == 7, 255, EIGHT)))
    key = encode(Image.fromarray(SIXTEEN), "PNG", transparency=int(SIXTEEN[3, 3]))
    np.testing.assert_array_equal(pixels(key), grey(np.where(SIXTEEN[3, 3] == SIXTEEN, 255, EIGHT)))
    palette = Image.fromarray(EIGHT).convert("P")
    colours = np.asarray(palette.convert("RGB")).astype(float)
    alphas = bytes(255 - k for k in range(256))
    expected = on_white(colours, np.frombuffer(alphas, np.uint8)[np.asarray(palette)])
    assert np.abs(pixels(encode(palette, "PNG", transparency=alphas)) - expected).max() <= 1
    # Of 2 and 4 bits, where the transparent grey level is given in the file's own samples.
    np.testing.assert_array_equal(
        pixels(png(4, 1, 2, 0, b"\0\x1b", (b"tRNS", b"\0\1"))), grey(np.array([[0, 255, 170, 255]]))
    )
    np.testing.assert_array_equal(pixels(png(2, 1, 4, 0, b"\0\x0e", (b"tRNS", b"\0\x0e"))), grey(np.array([[0, 255]])))
    sample = struct.pack(">6H", 65535, 0, 32768, 1, 2, 3)
    with pytest.raises(DataError, match="16 bits a sample and one transparent colour"):
        decode(png(2, 1, 16, 2, b"\0" + sample, (b"tRNS", struct.pack(">3H", 1, 2, 3))), "here")


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused_and_one_is_not(form: str) -> None:
    frames = [Image.fromarray(grey(array)) for array in (EIGHT, 255 - EIGHT, EIGHT.T)]
    content = encode(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=rf"here: the image \({form}\) has 3 frames"):
        decode(content, "here")
    np.testing.assert_array_equal(pixels(encode(frames[0], form, save_all=True)), grey(EIGHT))


def test_cmyk_and_one_bit_are_read_as_pillow_reads_them() -> None:
    cmyk = Image.fromarray(grey(EIGHT)).convert("CMYK")
    np.testing.assert_array_equal(pixels(encode(cmyk, "TIFF")), grey(EIGHT))
    jpeg = encode(cmyk, "JPEG", quality=100)
    assert np.abs(pixels(jpeg).astype(int) - grey(EIGHT)).max() <= 8
    for form in ("PNG", "TIFF", "BMP", "GIF"):
        one = Image.fromarray(EIGHT > 99)
        np.testing.assert_array_equal(pixels(encode(one, form)), grey(np.where(EIGHT > 99, 255, 0)))


def test_what_follows_a_cameras_picture_is_not_another_frame() -> None:
    picture, preview = (Image.fromarray(grey(array)) for array in (EIGHT, 255 - EIGHT))
    content = encode(picture, "MPO", save_all=True, append_images=[preview], quality=100)
    assert np.abs(pixels(content).astype(int) - grey(EIGHT)).max() <= 8


def test_metadata_that_cannot_be_read_give_no_orientation() -> None:
    content = encode(Image.fromarray(EIGHT), "PNG", exif=b"Exif\0\0no directory")
    np.testing.assert_array_equal(pixels(content), grey(EIGHT))


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_never_opened(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(Image.fromarray(grey(EIGHT)), form)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match="expected a whole PNG, JPEG, WebP, BMP, TIFF or GIF file"):
        decode(content, "here")


@pytest.mark.parametrize("side", [8193, 9_000, 13_000, 20_000, 2**31 - 1])
def test_huge_images_are_refused_by_their_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(DataError, match=rf"here: the image has .* pixels; most are {MAX_PIXELS:,}"):
        decode(png(side, side, 8, 0), "here")


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.3: what the stored rows and columns stand for (0th row at the visual top, and so on)."""
    turned = array.swapaxes(0, 1) if orientation >= 5 else array
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return turned[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


@st.composite
def _files(draw: st.DrawFn) -> tuple[bytes, list[np.ndarray]]:
    """Draw a file and the RGB pixels it stands for (several where a rounding decides, none: it must be refused)."""
    mode = draw(st.sampled_from(["L", "I;16", "F", "RGB", "LA", "RGBA", "P"]))
    forms = {"I;16": ["PNG", "TIFF"], "F": ["TIFF"], "P": ["PNG"], "L": ["PNG", "TIFF", "BMP"]}
    form = draw(st.sampled_from(forms.get(mode, ["PNG", "TIFF"] + ["WEBP"] * (mode in ("RGB", "RGBA")))))
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    bands = {"RGB": (3,), "RGBA": (4,), "LA": (2,)}.get(mode, ())
    kind = {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)
    elements = st.floats(0, 1, width=32) if mode == "F" else None
    array = draw(hnp.arrays(kind, (*shape, *bands), elements=elements))
    if mode in ("LA", "RGBA") and draw(st.booleans()):
        array[..., :-1] = draw(st.sampled_from([0, 128, 255]))  # ink in the alpha channel alone
    options: dict[str, Any] = {}
    image = Image.fromarray(array)
    alpha = np.full(shape, 255, np.uint8)
    if mode == "P":
        image = Image.fromarray(array).convert("P")
        alphas = draw(st.binary(min_size=256, max_size=256))
        colour, alpha = np.asarray(image.convert("RGB")), np.frombuffer(alphas, np.uint8)[np.asarray(image)]
        options["transparency"] = alphas
    elif mode in ("LA", "RGBA"):
        colour, alpha = array[..., :-1].repeat(3 // (array.shape[2] - 1), axis=2), array[..., -1]
    elif mode == "RGB":
        colour = array
    else:
        colour = grey(array.astype(float) * {"I;16": 255 / 65535, "F": 255, "L": 1}[mode])
    if form in ("PNG", "WEBP", "TIFF") and mode != "P":
        orientation = draw(st.integers(1, 8))
        exif = Image.Exif()
        exif[0x112] = orientation
        options["exif"] = exif
        colour, alpha = _upright(colour, orientation), _upright(alpha, orientation)
    if mode == "I;16" and array.max() < 4096 and len(np.unique(array)) > 16:
        return encode(image, form, **options), []
    if not alpha.any() and np.ptp(colour.reshape(-1, 3), axis=0).any():
        return encode(image, form, **options), []
    white, black = on_white(colour, alpha), colour * (alpha[..., None] / 255.0)
    contrasts = [np.ptp(x.reshape(-1, 3), axis=0).max() for x in (white, black)]
    expected = [white, black] if (alpha < 255).any() and abs(np.array(contrasts) - 15.5).min() < 2 else [white]
    if (alpha < 255).any() and contrasts[0] < 14 and contrasts[1] > 17:
        expected = [black]
    return encode(image, form, **options), expected


@settings(max_examples=150, deadline=None)
@given(_files())
def test_any_image_is_what_its_file_says(drawn: tuple[bytes, list[np.ndarray]]) -> None:
    content, expected = drawn
    if not expected:
        with pytest.raises(DataError, match="here: "):
            decode(content, "here")
        return
    got = pixels(content)
    assert got.shape == expected[0].shape
    assert min(np.abs(got - values).max() for values in expected) <= 1


_WHOLE = [
    encode(Image.fromarray(SIXTEEN), "PNG"),
    encode(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
    encode(Image.fromarray(grey(EIGHT)), "JPEG"),
    encode(Image.fromarray(EIGHT), "GIF"),
    encode(Image.fromarray(grey(EIGHT)), "WEBP"),
    encode(Image.fromarray(grey(EIGHT)), "BMP"),
]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(_WHOLE),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
)
def test_damaged_files_decode_or_are_refused(content: bytes, changes: list[tuple[float, int]], keep: float) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        # Damage sits mostly in the header, where it changes what a file claims.
        damaged[int(place * min(len(damaged), 160))] = value
    with contextlib.suppress(DataError):
        assert decode(bytes(damaged[: int(keep * len(damaged)) + 1]), "here").mode == "RGB"
