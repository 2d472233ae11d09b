"""image_folders: a tree of image files, as torchvision's ``ImageFolder`` has it, for one domain or several.

    DIR/DOMAIN/CLASS/*.png                     domains, each split 80/20 (fednorm.data.partition.train_and_test)
    DIR/DOMAIN/{train,test}/CLASS/*.png        domains with test images of their own
    DIR/CLASS/*.png                            one domain, named as the folder is
    DIR/{train,test}/CLASS/*.png               one domain with test images of its own

Which of these a folder is, is told by where its images are. Classes are what their folders are called, in natural
order, and must be the same in every domain; a class without images has an empty folder.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.cache import Pixels, cached, file_key
from fednorm.data.classes import in_natural_order, some
from fednorm.data.images import decode
from fednorm.data.own import split_note
from fednorm.data.partition import train_and_test
from fednorm.data.shards import SPLIT_WORDS, entries, require_regular
from fednorm.data.source import Source, align_classes, stack
from fednorm.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""How the names of image files end, in lower case."""

_WORDS = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_LAYOUTS = (
    "DIR/DOMAIN/CLASS/*.png, DIR/DOMAIN/{train,test}/CLASS/*.png, DIR/CLASS/*.png or DIR/{train,test}/CLASS/*.png"
)


@dataclass(frozen=True)
class _Tree:
    """The images of a domain.

    Attributes:
        folder: Its folder.
        classes: The classes' names.
        train: Training images, each with its class.
        test: Test images; none where the domain has no such folder.
        notes: What was left out, or stands in.
    """

    folder: Path
    classes: tuple[str, ...]
    train: tuple[tuple[Path, str], ...]
    test: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()


def _image_folders(reader: Reader) -> Loaded:
    directory = reader.directory
    tops = _folders(directory)
    if not tops:
        raise DataError(f"{directory} holds no folder of images; expected {_LAYOUTS}.")
    alone = _is_domain(directory, tops)
    folders = {directory.resolve().name or "images": directory} if alone else {path.name: path for path in tops}
    names = tuple(folders)
    wanted = reader.wanted(names) or names
    trees = [_tree(folders[name]) for name in wanted]
    sources, aligned_notes = align_classes(
        [_source(name, tree, reader) for name, tree in zip(wanted, trees, strict=True)]
    )
    unsplit = [name for name, tree in zip(wanted, trees, strict=True) if not tree.test]
    notes = [*(note for tree in trees for note in tree.notes), *aligned_notes]
    if unsplit:
        notes.append(split_note(unsplit, reader.config.split_seed))
    domains = tuple(domain for source in sources for domain in source.split_domains())
    return loaded("image folders", sources, domains, tuple(notes))


def _is_domain(directory: Path, tops: Sequence[Path]) -> bool:
    """Return whether a folder is a domain itself, of classes or splits, and no folder of domains.

    Raises:
        DataError: Some of its folders hold images and some hold folders.
    """
    if all(path.name in _WORDS for path in tops):
        return True
    classes = [path.name for path in tops if not _folders(path)]
    others = [path.name for path in tops if _folders(path)]
    if classes and others:
        raise DataError(
            f"{directory} holds folders of images ({some(classes)}) beside folders of folders ({some(others)}): "
            f"whether they are classes or domains is not said. Expected {_LAYOUTS}."
        )
    return bool(classes)


def _folders(directory: Path) -> list[Path]:
    return [path for path in entries(directory) if not path.name.startswith(".") and path.is_dir()]


def _tree(folder: Path) -> _Tree:
    """Return the images of a domain's folder.

    Raises:
        DataError: There are none, or folders are where images should be.
    """
    tops = _folders(folder)
    if not tops or not all(path.name in _WORDS for path in tops):
        images, classes, notes = _classes(folder)
        return _Tree(folder, classes, images, notes=notes)
    places: dict[str, Path] = {}
    for path in tops:
        if (split := _WORDS[path.name]) in places:
            raise DataError(f"{folder} has {places[split].name} and {path.name}, both {split}. Keep one of them.")
        places[split] = path
    if "train" not in places:
        raise DataError(f"{folder} has no training images: expected {folder}/train/CLASS/*.png.")
    train, classes, notes = _classes(places["train"])
    stand_in = () if "test" in places else ("validation",)
    tested = next((places[split] for split in ("test", *stand_in) if split in places), None)
    if tested is None:
        return _Tree(folder, classes, train, notes=notes)
    test, test_classes, more = _classes(tested)
    unknown = sorted(set(test_classes) - set(classes))
    if unknown:
        raise DataError(
            f"{tested} has class {some(unknown)}, which {places['train']} has not: {some(classes)}. Rename it, or make "
            "an empty folder for it there."
        )
    if stand_in:
        more = (*more, f"{folder.name} has no test images: its validation images are the test images here.")
    return _Tree(folder, classes, train, test, (*notes, *more))


def _classes(folder: Path) -> tuple[tuple[tuple[Path, str], ...], tuple[str, ...], tuple[str, ...]]:
    """Return the images of a folder of classes, each with its class; the classes; and what was left out."""
    classes = in_natural_order(path.name for path in _folders(folder))
    images: list[tuple[Path, str]] = []
    others: list[Path] = [path for path in entries(folder) if not path.name.startswith(".") and not path.is_dir()]
    stray = next((path for path in others if _is_image(path)), None)
    if stray is not None:
        raise DataError(f"{stray} stands in no class's folder. Expected {_LAYOUTS}.")
    for name in classes:
        for path in entries(folder / name):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                raise DataError(f"{path} is a folder where images of class {name} are expected: {_LAYOUTS}.")
            if path.suffix.lower() in SUFFIXES:
                require_regular(path)
                images.append((path, name))
            elif _is_image(path):
                raise DataError(
                    f"{path} is an image of a kind that is not read; expected {', '.join(SUFFIXES)}. Convert it."
                )
            else:
                others.append(path)
    if not images:
        raise DataError(f"{folder} holds no images; expected {_LAYOUTS}.")
    left_out = (
        f"{folder.name}: {len(others)} files that are no images were left out (such as {others[0].name})."
        if others
        else ""
    )
    return tuple(images), classes, (left_out,) if left_out else ()


def _is_image(path: Path) -> bool:
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def _source(name: str, tree: _Tree, reader: Reader) -> Source:
    images, size = (*tree.train, *tree.test), reader.image_size
    number = {label: k for k, label in enumerate(tree.classes)}
    labels = np.array([number[label] for _, label in images], dtype=np.int64)
    train = np.arange(len(tree.train), dtype=np.int64)
    test = np.arange(len(tree.train), len(images), dtype=np.int64)
    if not tree.test:
        train, test = train_and_test(name, labels, reader.config.split_seed)

    def read() -> Pixels:
        return stack((decode(_content(path), str(path)) for path, _ in images), len(images), size)

    key = ["image_folders", f"image_size={size}", *(file_key(path) for path, _ in images)]
    return Source(
        name=name,
        images=cached(f"{name}-{size}", key, read, reader.cache_dir, shape=(len(images), 3, size, size)),
        labels=labels,
        train=train,
        test=test,
        files=((str(tree.folder / "*"), len(images)),),
        class_names=tree.classes,
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Copy the file again.") from error


SPEC = Benchmark(
    name="image_folders",
    summary="image files in folders of classes (torchvision's ImageFolder), for each domain or for one",
    note="DOMAIN/CLASS/*.png or DOMAIN/{train,test}/CLASS/*.png; split 80/20 by data.split_seed where nothing is test.",
    load=_image_folders,
)
