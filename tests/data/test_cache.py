from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fednorm.data.cache import cache_folder, cached

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)


def test_the_folder_is_the_argument_then_the_variable_then_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDNORM_CACHE", "own")
    assert cache_folder(tmp_path) == tmp_path
    assert cache_folder() == Path("own")
    monkeypatch.delenv("FEDNORM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fednorm"


def test_an_array_is_made_once_and_no_half_file_stays(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> np.ndarray:
        calls.append(1)
        return ARRAY

    for _ in range(2):
        np.testing.assert_array_equal(cached("x", ["k"], make, tmp_path), ARRAY)
    assert len(calls) == 1
    cached("x", ["other key"], make, tmp_path)
    assert len(calls) == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy", ".npy"]


def test_a_broken_cache_file_is_made_anew(tmp_path: Path) -> None:
    cached("x", ["k"], lambda: ARRAY, tmp_path)
    (path,) = tmp_path.iterdir()
    for content in (b"", b"garbage", path.read_bytes()[:-5]):
        path.write_bytes(content)
        np.testing.assert_array_equal(cached("x", ["k"], lambda: ARRAY, tmp_path), ARRAY)


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    assert cached("x", ["k"], lambda: ARRAY, blocked / "below") is ARRAY


def test_a_full_disk_is_no_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert cached("x", ["k"], lambda: ARRAY, tmp_path) is ARRAY
    assert list(tmp_path.iterdir()) == []


def test_torch_takes_the_mapped_array_without_warning_and_the_file_never_changes(tmp_path: Path) -> None:
    cached("x", ["k"], lambda: ARRAY, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.from_numpy(cached("x", ["k"], lambda: ARRAY, tmp_path))
    tensor.zero_()
    np.testing.assert_array_equal(cached("x", ["k"], lambda: ARRAY, tmp_path), ARRAY)


def test_a_file_that_only_looks_like_the_array_is_made_anew(tmp_path: Path) -> None:
    def path() -> Path:
        cached("x", ["k"], lambda: ARRAY, tmp_path, shape=ARRAY.shape)
        (path,) = tmp_path.iterdir()
        return path

    whole = path().read_bytes()
    others = [
        ARRAY.reshape(24),
        ARRAY[:1],
        np.zeros((0, 3, 2, 2), np.uint8),
        ARRAY.astype(np.int8),
        np.asfortranarray(ARRAY),
    ]
    for other in others:
        np.save(path(), other)
        np.testing.assert_array_equal(cached("x", ["k"], lambda: ARRAY, tmp_path, shape=ARRAY.shape), ARRAY)
        assert path().read_bytes() == whole
    with path().open("wb") as file:
        np.savez(file, ARRAY)
    for content in (None, whole + b"\0", whole[:10] + b"\xff" * 20 + whole[30:], whole.replace(b"(2, 3", b"(2, ((")):
        if content is not None:
            path().write_bytes(content)
        np.testing.assert_array_equal(cached("x", ["k"], lambda: ARRAY, tmp_path, shape=ARRAY.shape), ARRAY)
        assert path().read_bytes() == whole


def test_a_fifo_in_the_cache_is_replaced_and_a_folder_left(tmp_path: Path) -> None:
    cached("x", ["k"], lambda: ARRAY, tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    np.testing.assert_array_equal(cached("x", ["k"], lambda: ARRAY, tmp_path), ARRAY)
    assert path.is_file()
    path.unlink()
    path.mkdir()
    assert cached("x", ["k"], lambda: ARRAY, tmp_path) is ARRAY
    assert list(tmp_path.iterdir()) == [path]
