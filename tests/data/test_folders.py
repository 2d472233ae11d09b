from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fednorm.data.folders import list_folders, read_folder
from fednorm.errors import DataError


def _colour(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("image", "label", "form"), [("image", "label", "PNG"), ("img", "fine_label", "WEBP")])
def test_pixels_and_labels_come_back_as_written(
    tmp_path: Path, write_file: Any, image: str, label: str, form: str
) -> None:
    train, test = _colour(5), 255 - _colour(3)
    kwargs = {"image": image, "label": label, "form": form, "names": ["a", "b"]}
    write_file(tmp_path / "d/train-00000-of-00002.parquet", list(train[:2]), [0, 1], **kwargs)
    write_file(tmp_path / "d/train-00001-of-00002.parquet", list(train[2:]), [1, 0, 1], **kwargs)
    write_file(tmp_path / "d/test-00000-of-00001.parquet", list(test), [0, 0, 1], **kwargs)
    source = read_folder(tmp_path, "d", 8)
    np.testing.assert_array_equal(source.images, np.concatenate([train, test]).transpose(0, 3, 1, 2))
    assert source.images.dtype == np.uint8
    assert source.labels.tolist() == [0, 1, 1, 0, 1, 0, 0, 1]
    assert (source.train.tolist(), source.test.tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7])
    assert source.class_names == ("a", "b")
    assert source.domains is None
    assert "train-00001-of-00002.parquet, row 1" in source.where(3)


def test_jpeg_decodes_and_size_changes_as_pillow_does(tmp_path: Path, write_file: Any) -> None:
    smooth = np.add.outer(np.arange(8), np.arange(8)).astype(np.uint8)[..., None].repeat(3, 2) * 16
    for split in ("train", "test"):
        write_file(tmp_path / f"d/{split}-0.parquet", [smooth], [0], names=["a"], form="JPEG")
    source = read_folder(tmp_path, "d", 5)
    encoded = pq.read_table(tmp_path / "d/train-0.parquet")["image"][0].as_py()["bytes"]
    expected = np.asarray(Image.open(io.BytesIO(encoded)).resize((5, 5), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(source.images[0], expected.transpose(2, 0, 1))


def test_grey_becomes_three_equal_channels(tmp_path: Path, write_file: Any) -> None:
    grey = _colour(2)[..., 0]
    for split in ("train", "test"):
        write_file(tmp_path / f"d/{split}-0.parquet", list(grey), [0, 1])
    source = read_folder(tmp_path, "d", 8)
    for channel in range(3):
        np.testing.assert_array_equal(source.images[:2, channel], grey)


@pytest.mark.parametrize("as_class_label", [False, True])
def test_a_domain_column_gives_each_row_its_domain(tmp_path: Path, write_file: Any, as_class_label: bool) -> None:
    for split in ("train", "test"):
        values = [1, 0, 1] if as_class_label else ["web", "cam", "web"]
        names = ["cam", "web"] if as_class_label else None
        write_file(tmp_path / f"d/{split}-0.parquet", list(_colour(3)), [0, 1, 0], domain=values, domain_names=names)
    source = read_folder(tmp_path, "d", 8)
    assert source.domains is not None
    assert source.domains.tolist() == ["web", "cam", "web"] * 2
    cam, web = source.split_domains()
    assert (cam.name, cam.train.index.tolist(), cam.test.index.tolist()) == ("cam", [1], [4])
    assert (web.name, web.train.index.tolist(), web.test.index.tolist()) == ("web", [0, 2], [3, 5])
    assert cam.train.images is web.test.images


def test_a_decoded_folder_is_mapped_at_the_second_reading(
    tmp_path: Path, write_folder: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, "d")
    first = read_folder(tmp_path, "d", 8)
    monkeypatch.setattr("fednorm.data.folders.stack", lambda *_: pytest.fail("decoded twice"))
    again = read_folder(tmp_path, "d", 8)
    np.testing.assert_array_equal(first.images, again.images)
    assert isinstance(again.images, np.memmap)
    assert [path.suffix for path in own_cache.iterdir()] == [".npy"]


def test_a_changed_file_and_another_size_are_decoded_anew(tmp_path: Path, write_folder: Any, write_file: Any) -> None:
    write_folder(tmp_path, "d", num_test=3)
    assert read_folder(tmp_path, "d", 8).images.shape == (23, 3, 8, 8)
    assert read_folder(tmp_path, "d", 4).images.shape == (23, 3, 4, 4)
    write_file(tmp_path / "d/test-00000-of-00001.parquet", [np.zeros((8, 8, 3), np.uint8)] * 3, [0, 1, 0])
    assert not read_folder(tmp_path, "d", 8).images[20:].any()


def test_missing_folder_lists_what_is_there(tmp_path: Path, write_folder: Any) -> None:
    write_folder(tmp_path, "usps")
    write_folder(tmp_path, "mnist")
    (tmp_path / "empty").mkdir()
    assert list_folders(tmp_path) == ("mnist", "usps")
    with pytest.raises(DataError, match=r"no folder .*svhn.*holds mnist, usps"):
        read_folder(tmp_path, "svhn", 8)


def test_missing_split_and_missing_shard(tmp_path: Path, write_folder: Any, write_file: Any) -> None:
    folder = write_folder(tmp_path, "d")
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"no test images: expected test-\*\.parquet, found train-00000"):
        read_folder(tmp_path, "d", 8)
    write_file(folder / "test-00001-of-00002.parquet", list(_colour(1)), [0])
    with pytest.raises(DataError, match="announces 2 test files, found 1"):
        read_folder(tmp_path, "d", 8)


@pytest.mark.parametrize("keep", [0, 100, -20])
def test_a_truncated_file_is_named(tmp_path: Path, write_folder: Any, keep: int) -> None:
    path = write_folder(tmp_path, "d") / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet cannot be read.*copy it again"):
        read_folder(tmp_path, "d", 8)


def test_damaged_pages_under_a_whole_footer_are_named(tmp_path: Path, write_folder: Any) -> None:
    path = write_folder(tmp_path, "d") / "train-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet"):
        read_folder(tmp_path, "d", 8)


@pytest.mark.parametrize("broken", [b"not an image", "half", None])
def test_an_undecodable_image_is_named_with_its_row(
    tmp_path: Path, write_folder: Any, write_file: Any, broken: Any
) -> None:
    folder = write_folder(tmp_path, "d")
    images: list[Any] = list(_colour(3, 32))
    if broken == "half":
        buffer = io.BytesIO()
        Image.fromarray(images[1]).save(buffer, "PNG")
        broken = buffer.getvalue()[: buffer.tell() // 2]
    images[1] = broken
    write_file(folder / "test-00000-of-00001.parquet", images, [0, 1, 0])
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet, row 1: the image"):
        read_folder(tmp_path, "d", 8)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, -1], None, "row 1: label -1 is outside 0 to K - 1"),
        ([0, 2], ["a", "b"], "row 1: label 2 is outside 0 to 1 .*names 2 classes"),
        ([0, None], None, "row 1: the label is missing"),
        ([0.0, 1.0], None, "must hold integers"),
    ],
)
def test_unfit_labels(
    tmp_path: Path, write_folder: Any, write_file: Any, labels: list[Any], names: list[str] | None, message: str
) -> None:
    folder = write_folder(tmp_path, "d")
    write_file(folder / "train-00000-of-00001.parquet", list(_colour(2)), labels, names=names)
    with pytest.raises(DataError, match=rf"train-00000-of-00001\.parquet.*{message}"):
        read_folder(tmp_path, "d", 8)


def test_missing_columns_and_a_column_of_another_type(tmp_path: Path, write_folder: Any) -> None:
    path = write_folder(tmp_path, "d") / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"picture": ["x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"no image column: expected image or img, found picture, label\. Rename"):
        read_folder(tmp_path, "d", 8)
    pq.write_table(pa.table({"image": ["x"], "y": [0]}), path)
    with pytest.raises(DataError, match="no label column: expected label or fine_label or labels, found image, y"):
        read_folder(tmp_path, "d", 8)
    pq.write_table(pa.table({"image": ["x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"must be a struct with a field 'bytes'.*it is string"):
        read_folder(tmp_path, "d", 8)
