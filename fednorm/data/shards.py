"""Which files of a folder are a split's shards: the layouts of the Hugging Face Hub, each shard once and none missing.

A split's files are named as ``datasets`` names and recognises them: a word for the split (``train``; ``test`` or
``eval``; ``validation``, ``valid``, ``val`` or ``dev``), then nothing or a separator and anything, then ``.parquet``:
``train.parquet``, ``train-00000-of-00002.parquet``, ``train-00000-of-00002-0f3e5c6b7c1f1e9a.parquet``. Or the word is a
folder: ``train/0000.parquet``. They stand in the data set's folder itself or in one folder of it (``data``, or the one
that holds any). Where there are no test images, validation images are tested on, and the tables say so.
"""

from __future__ import annotations

import filecmp
import re
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fednorm.data.classes import some
from fednorm.errors import DataError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""The words that ``datasets`` takes for a split, by its name."""

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
DOMAIN_COLUMN = "domain"
"""What ``datasets`` calls the columns of a shard that are read."""

_SUFFIX = ".parquet"
_NUMBERED = re.compile(r"(?P<stem>.*?)-?(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?:-[0-9A-Za-z]+)?\.parquet")
_COUNTED = re.compile(r"(?P<stem>.*?)(?P<number>\d{1,9})\.parquet")


@dataclass(frozen=True)
class Shards:
    """The files of a data set.

    Attributes:
        train: Those of the training images, in order.
        test: Those of the test images, in order.
        note: What a reader of a table must know about the choice.
    """

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    note: str = ""


def holds_parquet(folder: Path) -> bool:
    """Return whether a folder holds Parquet files in one of the layouts."""
    try:
        return bool(_places(folder))
    except DataError:
        return False


def find_shards(folder: Path) -> Shards:
    """Return the files of the training and test images of a data set's folder.

    Raises:
        DataError: A split has no files, a shard is missing or there twice, files stand in several places, or one is
            no regular file.
    """
    places = _places(folder)
    if len(places) > 1:
        raise DataError(
            f"{folder} holds Parquet files in several places: {_names(places, folder)}. Keep those of one data set "
            f"there, and make each of the others a folder of its own beside {folder.name}."
        )
    place = places[0] if places else folder
    splits = {split: _split_files(place, words) for split, words in SPLIT_WORDS.items()}
    train = splits["train"] or _no_files(place, "train")
    if test := splits["test"]:
        return Shards(_complete(place, "train", train), _complete(place, "test", test))
    test = splits["validation"] or _no_files(place, "test")
    note = f"{folder.name} has no test images: its validation images are the test images here."
    return Shards(_complete(place, "train", train), _complete(place, "validation", test), note)


def entries(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted by name.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def require_regular(path: Path) -> None:
    """Refuse what is no regular file: opening a FIFO waits for ever, a device never ends.

    Raises:
        DataError: It is something else, or not there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Copy the file again.") from error
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISDIR: "a folder",
    }
    kind = next((name for test, name in kinds.items() if test(mode)), "something else")
    raise DataError(f"{path} is {kind}; expected a regular file. Remove it, or put the file in its place.")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _places(folder: Path) -> list[Path]:
    """Return where Parquet files stand: the folder or its ``data``, else other folders in it; splits before others."""
    usual = [folder, folder / "data"]
    others = [path for path in _readable(folder) if _is_folder(path) and not _word_of(path.name)]
    for candidates, holds in ((usual, _holds_split), (others, _holds_split), (usual, _holds_any), (others, _holds_any)):
        places = [path for path in candidates if holds(path)]
        if places:
            return places
    return []


def _readable(folder: Path) -> list[Path]:
    try:
        return entries(folder)
    except DataError:
        return []


def _holds_split(place: Path) -> bool:
    return any(_split_files(place, words) for words in SPLIT_WORDS.values())


def _holds_any(place: Path) -> bool:
    return any(path.name.endswith(_SUFFIX) for path in _readable(place))


def _word_of(name: str) -> str:
    """Return the split whose word a name is, or nothing."""
    return next((split for split, words in SPLIT_WORDS.items() if name in words), "")


def _split_files(place: Path, words: Sequence[str]) -> list[Path]:
    """Return the Parquet files of a split in a place, sorted by name: by their own names or in a folder of its name."""
    named = re.compile(rf"(?:{'|'.join(words)})(?:[-._ 0-9].*)?\.parquet")
    files = []
    for path in _readable(place):
        if named.fullmatch(path.name):
            files.append(path)
        elif path.name in words and _is_folder(path):
            files.extend(inner for inner in _readable(path) if inner.name.endswith(_SUFFIX))
    return files


def _no_files(place: Path, split: str) -> list[Path]:
    there = [path.name for path in entries(place)]
    parquet = [name for name in there if name.endswith(_SUFFIX)]
    rename = f" If {parquet[0]} holds them, rename it to {split}-00000-of-00001{_SUFFIX}." if parquet else ""
    raise DataError(
        f"{place} has no {split} images: expected {split}-*.parquet, found {some(there) or 'nothing of that kind'}."
        f"{rename}"
    )


def _names(paths: Sequence[Path], folder: Path) -> str:
    return some([str(path.relative_to(folder)) if path != folder else "the folder itself" for path in paths])


def _complete(place: Path, split: str, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the shards of a split, checked: regular files, each once, none missing."""
    for path in paths:
        require_regular(path)
    numbered = [(path, match) for path in paths if (match := _NUMBERED.fullmatch(path.name))]
    if numbered:
        strangers = [path.name for path in paths if not _NUMBERED.fullmatch(path.name)]
        if strangers:
            raise DataError(
                f"{place} holds the {split} file {numbered[0][0].name}, one of several that announce their number, and "
                f"beside it {some(strangers)}. Keep one set of files: the others would be images twice over."
            )
        groups: dict[tuple[Path, str], list[tuple[Path, re.Match[str]]]] = defaultdict(list)
        for path, match in numbered:
            groups[path.parent, match["stem"]].append((path, match))
        for shards in groups.values():
            _check_announced(place, split, shards)
    else:
        _check_counted(place, split, paths)
    _check_copies(place, split, paths)
    return tuple(paths)


def _check_announced(place: Path, split: str, shards: Sequence[tuple[Path, re.Match[str]]]) -> None:
    """Check files that say how many they are: 0 to n - 1 or 1 to n, each once."""
    counts = sorted({int(match["count"]) for _, match in shards})
    if len(counts) > 1:
        raise DataError(
            f"{place} mixes {split} files of sets of {' and of '.join(map(str, counts))}: "
            f"{some([path.name for path, _ in shards])}. Keep the files of one set."
        )
    numbers: dict[int, str] = {}
    for path, match in shards:
        number = int(match["number"])
        if number in numbers:
            raise DataError(
                f"{place} holds {split} file {number} of {counts[0]} twice: {numbers[number]} and {path.name}. "
                "Remove the one that was replaced."
            )
        numbers[number] = path.name
    first = 1 if counts[0] in numbers and 0 not in numbers else 0
    expected = range(first, first + counts[0])
    beyond = [name for number, name in numbers.items() if number not in expected]
    if beyond:
        raise DataError(f"{place}: {some(beyond)} announces {counts[0]} {split} files and is none of them. Remove it.")
    if len(numbers) < counts[0]:
        missing = []
        for number in expected:
            if number not in numbers:
                missing.append(number)
            if len(missing) == 3:
                break
        raise DataError(
            f"{place} is incomplete: {shards[0][0].name} announces {counts[0]} {split} files, found {len(numbers)}; "
            f"missing is number {', '.join(map(str, missing))}"
            f"{' and more' if counts[0] - len(numbers) > len(missing) else ''}. Copy the missing ones."
        )


def _check_counted(place: Path, split: str, paths: Sequence[Path]) -> None:
    """Check files that are numbered from 0 or 1 but do not say how many they are: no gap, no number twice."""
    matches = [(path, _COUNTED.fullmatch(path.name)) for path in paths]
    numbers: dict[int, str] = {}
    stems = set()
    for path, match in matches:
        if match is None:
            if len(paths) > 1:
                _refuse_mixture(place, split, paths)
            return
        stems.add((path.parent, match["stem"]))
        number = int(match["number"])
        if number in numbers and len(stems) == 1:
            raise DataError(
                f"{place} holds {split} file {number} twice: {numbers[number]} and {path.name}. Remove one."
            )
        numbers[number] = path.name
    if len(stems) > 1 or min(numbers) > 1:
        return
    gaps = sorted(set(range(min(numbers), min(max(numbers), min(numbers) + 10**6))) - set(numbers))
    if gaps:
        raise DataError(
            f"{place} is incomplete: its {split} files go up to {numbers[max(numbers)]}, and number "
            f"{some(gaps, most=3)} is missing. Copy the missing ones, or number the files without gaps."
        )


def _refuse_mixture(place: Path, split: str, paths: Sequence[Path]) -> None:
    """Refuse ``train.parquet`` beside other files of the split: the whole and its parts, or two versions of it."""
    words = {word + _SUFFIX for word in SPLIT_WORDS[split]}
    whole = [path.name for path in paths if path.name in words]
    if whole:
        others = [path.name for path in paths if path.name != whole[0]]
        raise DataError(
            f"{place} holds {whole[0]}, which would be all {split} images, and beside it {some(others)}. Keep the one "
            "or the others."
        )


def _check_copies(place: Path, split: str, paths: Sequence[Path]) -> None:
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        for other in by_size[path.stat().st_size]:
            if _same_content(path, other):
                raise DataError(
                    f"{place} holds the same {split} images twice: {other.name} and {path.name} are equal byte for "
                    "byte. Remove one of them (and number the others anew)."
                )
        by_size[path.stat().st_size].append(path)


def _same_content(first: Path, second: Path) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
