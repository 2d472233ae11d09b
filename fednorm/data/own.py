"""Anybody's data, given as objects: arrays, a torch ``Dataset``, a Hugging Face ``Dataset``, alone or by domain.

What may be given, wherever data is taken from Python::

    {"a": (images, labels), "b": (images, labels)}             domains of arrays or tensors
    {"a": {"train": (x, y), "test": (x, y)}, "b": ...}         with test images of their own
    {"a": dataset, "b": {"train": dataset, "test": dataset}}   map-style datasets of (image, label)
    (images, labels)  or  dataset  or  {"train": ..., "test": ...}   one domain, called "data"
    datasets.load_dataset(...)                                 a Hugging Face Dataset or DatasetDict

``"classes": [...]`` beside ``"train"`` names the classes. Datasets are known by what they can do (``len`` and
``[row]``), so neither torch's nor Hugging Face's class is needed. They are read once, item by item. A Hugging Face
dataset that has a column ``domain`` and is given alone is cut into domains by it.

Where a domain has no test images, a fifth of its images becomes its test images
(:func:`fednorm.data.partition.train_and_test`), and a note says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fednorm.data.arrays import Images, joined, read_image, read_images, read_labels, together
from fednorm.data.classes import Rows, missing_numbers, some
from fednorm.data.partition import train_and_test
from fednorm.data.shards import DOMAIN_COLUMN, IMAGE_COLUMNS, LABEL_COLUMNS, SPLIT_WORDS
from fednorm.data.source import Source, align_classes, count_classes
from fednorm.errors import DataError

ALONE = "data"
"""The name of the domain where only one is given, without a name."""

FORMS = (
    "a mapping of domain names to (images, labels), to datasets or to {'train': ..., 'test': ...}, or one of these "
    "alone"
)
"""What may be given, for errors."""

_CLASSES = "classes"


@dataclass(frozen=True, eq=False)
class Part:
    """Images and labels that were given together.

    Attributes:
        domain: The domain they are of.
        split: ``train`` or ``test``.
        images: The images.
        labels: As they are given; by ``names`` where those are there.
        names: The classes' names, where they are given.
        texts: Whether the names are no more than the labels that occur.
        note: What a reader of a table must know about them.
    """

    domain: str
    split: str
    images: Images
    labels: Rows
    names: tuple[str, ...] = ()
    texts: bool = False
    note: str = ""

    @property
    def where(self) -> str:
        """What the part is called in an error."""
        return f"domain {self.domain}, {self.split} images"


def is_data(given: Any) -> bool:
    """Return whether an object looks like data of one of the forms above; its contents are not looked at."""
    return isinstance(given, Mapping) or _is_pair(given) or _is_dataset(given)


def gather(given: Any) -> tuple[Part, ...]:
    """Read what was given into parts, a domain's training images before its test images.

    Raises:
        DataError: It is none of the forms, or some images or labels are unfit; the message names the domain and row.
    """
    parts: list[Part] = []
    if isinstance(given, Mapping) and not _is_splits(given):
        for name, value in given.items():
            parts += _domain(_domain_name(name), value)
    else:
        parts += _domain("", given)
    if not parts:
        raise DataError(f"The data has no domain. Expected {FORMS}.")
    _check(parts)
    return tuple(parts)


def digest(parts: Sequence[Part]) -> str:
    """Return what identifies parts: SHA-256 of their pixels, labels and names, 12 hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(repr((part.domain, part.split, part.names, part.images.digest())).encode())
        whole.update(part.labels.astype("<i8").tobytes())
    return whole.hexdigest()[:12]


def one_source(
    parts: Sequence[Part], *, name: str, image_size: int, split_seed: int
) -> tuple[Source, int, tuple[str, ...]]:
    """Return parts as one data set with a column of domains, so that all of them share one array.

    Args:
        parts: What :func:`gather` returned, or some domains of it.
        name: What the data set is called.
        image_size: S, the height and width to resize to.
        split_seed: Of the split of domains without test images.

    Returns:
        The data set, the number of its classes, and the sentences that belong under a table.

    Raises:
        DataError: Domains name different classes, a label is outside them, labels have gaps, a domain cannot be split,
            or the images do not fit into memory.
    """
    domains = tuple(dict.fromkeys(part.domain for part in parts))
    aligned, notes = align_classes([_labels_of(domain, parts) for domain in domains])
    num_classes = _count(aligned)
    splits = [_split(source, split_seed) for source in aligned]
    starts = np.cumsum([0, *(len(source.labels) for source in aligned)])
    rows = [[start + rows for start, rows in zip(starts, pick, strict=False)] for pick in zip(*splits, strict=True)]
    in_order = [part for domain in domains for part in parts if part.domain == domain]
    source = Source(
        name=name,
        images=joined([part.images for part in in_order], image_size),
        labels=np.concatenate([source.labels for source in aligned]),
        train=np.concatenate(rows[0]),
        test=np.concatenate(rows[1]),
        files=(),
        class_names=aligned[0].class_names,
        domains=np.repeat(np.array(domains, dtype=np.str_), [len(source.labels) for source in aligned]),
    )
    own = dict.fromkeys(part.note for part in in_order if part.note)
    unsplit = [source.name for source in aligned if not len(source.test)]
    return source, num_classes, (*own, *notes, *_notes(aligned, num_classes, unsplit, split_seed, in_order, image_size))


# What was given -------------------------------------------------------------------------------------------------------


def _is_pair(given: Any) -> bool:
    """Return whether it is ``(images, labels)``, not a list of two items."""
    if isinstance(given, tuple):
        return len(given) == 2
    return isinstance(given, list) and len(given) == 2 and not isinstance(given[0], tuple | dict)


def _is_dataset(given: Any) -> bool:
    if isinstance(given, type | str | bytes | tuple | Mapping) or hasattr(given, "__array__"):
        return False
    return hasattr(given, "__getitem__") and hasattr(given, "__len__")


def _is_splits(given: Mapping[Any, Any]) -> bool:
    words = {word for words in SPLIT_WORDS.values() for word in words} | {_CLASSES}
    return "train" in given and set(given) <= words


def _domain_name(name: Any) -> str:
    text = str(name) if isinstance(name, str | int | np.integer) else ""
    if not text.strip() or not text.isprintable() or len(text) > 200:
        raise DataError(
            f"The data is a mapping of domain names to images and labels; {str(name)[:40]!r} is no name of 1 to 200 "
            f"printable characters. Expected {FORMS}."
        )
    return text


def _domain(domain: str, given: Any) -> list[Part]:
    """Return a domain's parts; an empty name is that of data given alone, which may have a column of domains."""
    if not isinstance(given, Mapping):
        return _parts(domain, "train", given, ())
    if "train" not in given:
        raise DataError(
            f"Domain {domain} is a mapping with the keys {some(list(given), repr) or 'none'}; expected 'train', and "
            "'test' where there are test images. Give its images and labels under these."
        )
    classes = given.get(_CLASSES, ())
    test = next((word for split in ("test", "validation") for word in SPLIT_WORDS[split] if word in given), None)
    words = {"train", _CLASSES, *SPLIT_WORDS["test"], *SPLIT_WORDS["validation"]}
    unknown = [key for key in given if key not in words]
    if unknown:
        raise DataError(
            f"Domain {domain or ALONE} has a split {unknown[0]!r}, of which nothing is known; expected 'train' and "
            "'test'. Leave it out, or give it as one of these."
        )
    parts = _parts(domain, "train", given["train"], classes)
    if test is None:
        return parts
    tests = _parts(domain, "test", given[test], classes)
    if test in SPLIT_WORDS["validation"]:
        note = f"{domain or ALONE} has no test images: its validation images are the test images here."
        tests = [replace(part, note=note) for part in tests]
    return [*parts, *tests]


def _parts(domain: str, split: str, given: Any, classes: Sequence[Any]) -> list[Part]:
    where = f"domain {domain or ALONE}, {split} images"
    if _is_pair(given):
        images = read_images(given[0], where)
        labels, names = read_labels(given[1], f"domain {domain or ALONE}, {split} labels")
        if len(images) != len(labels):
            raise DataError(
                f"{where}: there are {len(images)} images and {len(labels)} labels. Give one label an image."
            )
        return [_named(Part(domain or ALONE, split, images, labels, names, bool(names)), classes)]
    if _is_dataset(given):
        return [_named(part, classes) for part in _items(domain, split, given, where)]
    if hasattr(given, "__array__"):
        raise DataError(f"{where} were given without labels. Give both: (images, labels).")
    raise DataError(
        f"{where}: a {type(given).__name__} is no data. Expected (images, labels) or a map-style dataset, with len() "
        "and [row]: list(...) of an iterable dataset, a loader's .dataset."
    )


def _named(part: Part, classes: Sequence[Any]) -> Part:
    """Return a part whose classes are named by the caller, where they are."""
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{part.where}: 'classes' are {str(classes)[:60]!r}; expected a list of texts.")
    names = tuple(classes)
    if len(set(names)) < len(names):
        raise DataError(f"{part.where}: 'classes' name a class twice: {some(names)}. Rename one.")
    if not names:
        return part
    return replace(_numbered(part, names), names=names, texts=False)


def _numbered(part: Part, names: Sequence[str]) -> Part:
    """Return a part with texts for labels numbered by given names; numbers stay as they are."""
    if not part.texts:
        return part
    unknown = [k for k, name in enumerate(part.names) if name not in set(names)]
    if unknown:
        row = int(np.flatnonzero(part.labels == unknown[0])[0])
        raise DataError(
            f"{part.where}, row {row}: label {part.names[unknown[0]]!r} is none of the classes {some(names)}. Rename "
            "it, or add it to them."
        )
    number = {name: k for k, name in enumerate(names)}
    table = np.array([number[name] for name in part.names], dtype=np.int64)
    return replace(part, labels=table[part.labels], names=tuple(names))


def _items(domain: str, split: str, dataset: Any, where: str) -> list[Part]:
    """Return the items of a dataset, once each; by its column of domains, where it has one and no name was given."""
    images: dict[str, list[Images]] = {}
    labels: dict[str, list[Any]] = {}
    keys = _keys(dataset)
    for row in range(_length(dataset, where)):
        here = f"{where}, row {row}"
        item = _item(dataset, row, here)
        image, label, of = _fields(item, keys, here)
        name = domain or (_of_column(dataset, of, here) if of is not None else ALONE)
        images.setdefault(name, []).append(read_image(image, here))
        labels.setdefault(name, []).append(label)
    names = _names(dataset, keys[1])
    if not images:
        return [Part(domain or ALONE, split, Images("uint8", ()), np.empty(0, dtype=np.int64), names)]
    parts = []
    for name, pictures in images.items():
        numbers, texts = read_labels(labels[name], f"domain {name}, {split} labels")
        part = Part(name, split, together(pictures, where), numbers, texts, bool(texts))
        parts.append(replace(_numbered(part, names), names=names, texts=False) if names else part)
    return parts


def _length(dataset: Any, where: str) -> int:
    try:
        return len(dataset)
    except Exception as error:
        raise DataError(
            f"{where}: the length of the {type(dataset).__name__} cannot be told ({error}). Give a map-style dataset."
        ) from error


def _item(dataset: Any, row: int, here: str) -> Any:
    try:
        return dataset[row]
    except Exception as error:
        raise DataError(
            f"{here}: reading the item of the {type(dataset).__name__} raised {type(error).__name__}: {error}. Mend "
            "the dataset, or leave the item out."
        ) from error


def _fields(item: Any, keys: tuple[Sequence[str], Sequence[str]], here: str) -> tuple[Any, Any, Any]:
    """Return an item's image, label and domain, None where it has no such column."""
    if isinstance(item, Mapping):
        image, label = (next((key for key in known if key in item), None) for known in keys)
        if image is None or label is None:
            raise DataError(
                f"{here}: the item has the keys {some(list(item), repr)}; expected an image under "
                f"{' or '.join(keys[0])} and a label under {' or '.join(keys[1])}. Rename them."
            )
        return item[image], item[label], item.get(DOMAIN_COLUMN)
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1], None
    size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise DataError(f"{here}: the item is a {type(item).__name__}{size}; expected (image, label). Give these two.")


def _keys(dataset: Any) -> tuple[Sequence[str], Sequence[str]]:
    """Return the keys under which images and labels may stand, the usual names first."""
    features = _features(dataset)
    images = [key for key, feature in features.items() if type(feature).__name__ == "Image"]
    labels = [
        key for key, feature in features.items() if type(feature).__name__ == "ClassLabel" and key != DOMAIN_COLUMN
    ]
    one = (images if len(images) == 1 else [], labels if len(labels) == 1 else [])
    return tuple(dict.fromkeys((*IMAGE_COLUMNS, *one[0]))), tuple(dict.fromkeys((*LABEL_COLUMNS, *one[1])))


def _features(dataset: Any) -> Mapping[str, Any]:
    features = getattr(dataset, "features", None)
    return features if isinstance(features, Mapping) else {}


def _names(dataset: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """Return the classes' names that a dataset tells, as Hugging Face and torchvision do, or nothing.

    torchvision's ``classes`` say nothing where a ``target_transform`` changes the labels.
    """
    features = _features(dataset)
    names: Any = next((getattr(features[key], "names", None) for key in keys if key in features), None)
    if not features:
        inner = dataset
        while not hasattr(inner, "classes") and hasattr(inner, "dataset"):  # torch.utils.data.Subset
            inner = inner.dataset
        changed = getattr(inner, "target_transform", None) is not None
        names = None if changed else getattr(inner, "classes", None)
    fits = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if fits and len(set(names)) == len(names) else ()


def _of_column(dataset: Any, value: Any, here: str) -> str:
    names = getattr(_features(dataset).get(DOMAIN_COLUMN), "names", None)
    if names and isinstance(value, int | np.integer) and 0 <= value < len(names):
        return str(names[value])
    if not isinstance(value, str | int | np.integer):
        raise DataError(f"{here}: domain {str(value)[:40]!r} is no name. Store a text or a whole number.")
    return _domain_name(value)


# What they are together -----------------------------------------------------------------------------------------------


def _check(parts: Sequence[Part]) -> None:
    for part in parts:
        if not len(part.images):
            raise DataError(f"{part.where}: there are none. Give the domain images, or leave it out.")
    for part in parts:
        if part.images.kind != parts[0].images.kind:
            raise DataError(
                f"{parts[0].where} are {parts[0].images.kind}, and {part.where} are {part.images.kind}. Give all of "
                "them as uint8, or all as floating point in [0, 1]."
            )
    given = [(part.domain, part.split) for part in parts]
    twice = next((place for place in given if given.count(place) > 1), None)
    if twice:
        raise DataError(f"Domain {twice[0]} is there more than once; every domain needs a name of its own.")
    lone = sorted({part.domain for part in parts} - {part.domain for part in parts if part.split == "train"})
    if lone:
        raise DataError(f"Domain {lone[0]} has no training images; a domain needs both. Leave it out, or give some.")


def _labels_of(domain: str, parts: Sequence[Part]) -> Source:
    """Return a domain's labels as a data set without pixels; training rows first, and all of them where none test."""
    own = [part for part in parts if part.domain == domain]
    train, tests = own[0], own[1:]
    test = [_numbered(part, train.names) if part.texts and train.names else part for part in tests]
    if any((train.texts and not part.names) or (part.texts and not train.names) for part in tests):
        raise DataError(
            f"Domain {domain} has texts for labels of one split and numbers for the other. Give both alike."
        )
    names = train.names or next((part.names for part in test if part.names), ())
    if any(part.names and part.names != names for part in test):
        raise DataError(
            f"Domain {domain} names its classes {some(names)} for training and {some(test[0].names)} for testing. Give "
            "both the same list."
        )
    for part in (train, *test):
        outside = np.flatnonzero(part.labels >= len(names))
        if names and len(outside):
            row = int(outside[0])
            raise DataError(
                f"{part.where}, row {row}: label {part.labels[row]} is outside 0 to {len(names) - 1}, the classes "
                f"{some(names)}. Number the classes from 0."
            )
    count = len(train.labels)
    labels = np.concatenate([train.labels, *(part.labels for part in test)])
    return Source(
        name=domain,
        images=np.empty((0, 3, 1, 1), dtype=np.uint8),
        labels=labels,
        train=np.arange(count, dtype=np.int64),
        test=np.arange(count, len(labels), dtype=np.int64),
        files=(),
        class_names=names,
    )


def _count(sources: Sequence[Source]) -> int:
    """Return K."""
    if not any(source.class_names for source in sources):
        present = sorted({int(label) for source in sources for label in np.unique(source.labels)})
        if gaps := missing_numbers(present, most=8):
            raise DataError(
                f"The labels of {', '.join(source.name for source in sources)} go up to {present[-1]}, but no image "
                f"has label {some(gaps)}. Number the classes 0 to K - 1 without gaps, or name them all, those that are "
                "empty on purpose too: {'train': (images, labels), 'classes': ['cat', 'dog']}."
            )
    return count_classes(sources)


def _split(source: Source, split_seed: int) -> tuple[Rows, Rows]:
    if len(source.test):
        return source.train, source.test
    return train_and_test(source.name, source.labels, split_seed)


def _notes(
    sources: Sequence[Source],
    num_classes: int,
    unsplit: Sequence[str],
    split_seed: int,
    parts: Sequence[Part],
    image_size: int,
) -> list[str]:
    notes = []
    if unsplit:
        notes.append(split_note(unsplit, split_seed))
    for source in sources:
        missing = sorted(set(range(num_classes)) - set(np.unique(source.labels).tolist()))
        if missing:
            named = [source.class_names[k] for k in missing] if source.class_names else missing
            notes.append(f"{source.name} has no images of class {some(named)}.")
    sizes = {size for part in parts for size in part.images.sizes} - {(image_size, image_size)}
    if sizes:
        shown = some([f"{height} x {width}" for height, width in sorted(sizes)], most=3)
        notes.append(f"Images of {shown} were resized to {image_size} x {image_size} pixels (data.image_size).")
    return notes


def split_note(domains: Sequence[str], split_seed: int) -> str:
    """Return the sentence for domains that were given without test images."""
    return (
        f"{some(domains)} came without test images: split 80/20 into training and test images, stratified by class, by "
        f"split seed {split_seed} (data.split_seed)."
    )
