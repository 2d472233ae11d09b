"""Which files are a split's: the Hub's layouts, and what is missing, doubled or no file."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednorm.data.shards import find_shards, holds_parquet
from fednorm.errors import DataError


def make(folder: Path, names: Sequence[str]) -> Path:
    """Write files of different content: what counts here is their names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train.parquet", "test.parquet"], ["train.parquet"], ["test.parquet"]),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None, None),
        (["data/train-00000-of-00001-0f3e.parquet", "data/test-00000-of-00001-a1b2.parquet"], None, None),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], None, None),
        (["default/train/0000.parquet", "default/test/0000.parquet"], None, None),
        (["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"], None, None),
        (["train-1-of-2.parquet", "train-2-of-2.parquet", "test-1.parquet"], None, None),
        (["training_0.parquet", "eval.parquet", "README.md"], ["training_0.parquet"], ["eval.parquet"]),
        (
            ["train.parquet", "test.parquet", "validation.parquet", "old/train.parquet"],
            ["train.parquet"],
            ["test.parquet"],
        ),
    ],
)
def test_the_hubs_layouts_are_read(
    tmp_path: Path, names: list[str], train: list[str] | None, test: list[str] | None
) -> None:
    shards = find_shards(make(tmp_path, names))
    train = train if train is not None else [name for name in names if "train" in name]
    test = test if test is not None else [name for name in names if "test" in name]
    assert [str(path.relative_to(tmp_path)) for path in shards.train] == train
    assert [str(path.relative_to(tmp_path)) for path in shards.test] == test
    assert shards.note == ""
    assert holds_parquet(tmp_path)


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev"])
def test_validation_images_stand_in_for_test_images_and_it_is_said(tmp_path: Path, word: str) -> None:
    folder = make(tmp_path / "tiny", ["data/train-0.parquet", f"data/{word}-00000-of-00001.parquet"])
    shards = find_shards(folder)
    assert [path.name for path in shards.test] == [f"{word}-00000-of-00001.parquet"]
    assert shards.note == "tiny has no test images: its validation images are the test images here."


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00001-of-00002-0f3e5c6b.parquet"], "announces 2 train files, found 1; missing is number 0. Copy"),
        (
            ["train-00000-of-00001-aa.parquet", "train-00000-of-00001-bb.parquet"],
            "train file 0 of 1 twice: train-00000-of-00001-aa.parquet and train-00000-of-00001-bb.parquet",
        ),
        (["train-00000-of-00002.parquet", "train-00001-of-00003.parquet"], "mixes train files of sets of 2 and of 3"),
        (["train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"], "beside it train-00000-of-00001 (1)"),
        (["train-00000-of-00001.parquet", "train.parquet"], "beside it train.parquet"),
        (["train-00000-of-00001.parquet", "train-00007-of-00001.parquet"], "train-00007-of-00001.parquet announces 1"),
        (["train.parquet", "train-0.parquet"], "train.parquet, which would be all train images"),
        (["train.parquet", "data/train.parquet"], "several places: the folder itself, data"),
        (["a/train.parquet", "b/train.parquet", "b/test.parquet"], "several places: a, b"),
        (["train/0000.parquet", "train/0002.parquet"], "go up to 0002.parquet, and number 1 is missing"),
        (["train-00.parquet", "train-0.parquet"], "train file 0 twice"),
        (["digits.parquet"], "If digits.parquet holds them, rename it to train-00000-of-00001.parquet"),
        (["data/0000.parquet", "data/test-0.parquet"], "data has no train images"),
    ],
)
def test_missing_doubled_and_unknown_files_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    test = [] if any("/test" in name for name in names) else ["test.parquet"]
    with pytest.raises(DataError, match=re.escape(message)):
        find_shards(make(tmp_path, [*names, *test]))


def test_a_shard_copied_under_another_number_is_noticed(tmp_path: Path) -> None:
    make(tmp_path, ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet"])
    (tmp_path / "train-00001-of-00002.parquet").write_bytes((tmp_path / "train-00000-of-00002.parquet").read_bytes())
    with pytest.raises(DataError, match="the same train images twice"):
        find_shards(tmp_path)


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "folder", "No such file"])
def test_what_is_no_file_is_refused_and_never_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, ["test.parquet"])
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    name = Path("train-0.parquet")
    if kind == "FIFO":
        os.mkfifo(name)
    elif kind == "device":
        name.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(name))
    elif kind == "folder":
        name.mkdir()
    else:
        name.symlink_to("nowhere")
    with pytest.raises(DataError, match=rf"train-0\.parquet (is a |cannot be read: ){kind}"):
        find_shards(tmp_path)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 6), place=st.sampled_from(["", "data", "default"]))
def test_a_set_is_complete_or_the_fault_is_named(
    data: st.DataObject, count: int, place: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hashes = data.draw(st.lists(st.sampled_from(["", "-0f3e5c6b7c1f1e9a", "-b2"]), min_size=count, max_size=count))
    split = data.draw(st.sampled_from(["train", "test"]))
    names = [f"{split}-{i:05d}-of-{count:05d}{hashes[i]}.parquet" for i in range(count)]
    fault = data.draw(st.sampled_from(["none", "missing", "twice"]))
    files, which = list(names), data.draw(st.integers(0, count - 1))
    if fault == "missing":
        files.remove(names[which])
    elif fault == "twice":
        files.append(f"{split}-{which:05d}-of-{count:05d}-again.parquet")
    folder = tmp_path_factory.mktemp("shards")
    other = "test" if split == "train" else "train"
    make(folder / place, [*files, f"{other}.parquet"])
    if fault == "none":
        assert [path.name for path in getattr(find_shards(folder), split)] == sorted(names)
        return
    message = f"{which}-of|file {which} of {count} twice|number {which}\\.|no {split} images"
    with pytest.raises(DataError, match=message):
        find_shards(folder)
