"""What a benchmark is, and what reads its data sets; the benchmarks themselves stand in :mod:`fednorm.data.sets`."""

from __future__ import annotations

import hashlib
import inspect
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from fednorm.cards import IN_PROCESS, Card, in_process
from fednorm.config import DataConfig
from fednorm.data import own
from fednorm.data.domain import Domain, Split
from fednorm.data.folders import list_folders, read_folder
from fednorm.data.shards import holds_parquet
from fednorm.data.source import Source, count_classes
from fednorm.data.torchvision_sets import SETS, list_torchvision, read_torchvision
from fednorm.errors import DataError, FedNormError

NOTES: Mapping[str, str] = {
    "synthdigits": "synthdigits: digits rendered in the manner of SYN Numbers, a stand-in; it is not SYN.",
    "streetdigits": "streetdigits: street-scene digits of Chars74K, few and unbalanced, a stand-in; it is not SVHN.",
}
"""What a table must say about a domain, by the data set's name."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a benchmark found.

    Attributes:
        title: How a table names the data.
        num_classes: K; labels are 0 to K - 1.
        domains: The domains, in order.
        notes: Sentences that belong under a table.
        class_names: The classes' names, where the data tells them.
    """

    title: str
    num_classes: int
    domains: tuple[Domain, ...]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Reads data sets of one directory at one image size; knows both formats.

    Attributes:
        config: The data section of a run's configuration.
        image_size: S, in pixels.
        cache_dir: Where decoded arrays are kept.
    """

    config: DataConfig
    image_size: int
    cache_dir: Path | None = None

    @property
    def directory(self) -> Path:
        """The folder that holds the data; a DataError where none is configured."""
        if not self.config.dir:
            raise DataError(
                f"Benchmark {self.config.name} reads real data: name its folder with --data-dir DIR (data.dir). "
                "Without a folder there is digits_mini, which is embedded."
            )
        try:
            path = Path(self.config.dir).expanduser()
            if self.config.download:
                path.mkdir(parents=True, exist_ok=True)
            is_folder, exists = path.is_dir(), path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user, a NUL
            reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
            raise DataError(f"The data folder {self.config.dir[:200]!r} cannot be used: {reason}.") from error
        if not is_folder:
            raise DataError(
                f"The data folder {path} {'is no folder' if exists else 'does not exist'}. Name an existing one with "
                "--data-dir DIR (data.dir)."
            )
        return path

    def held(self) -> tuple[str, ...]:
        """Return the data sets that the directory holds, in either format, sorted."""
        return tuple(sorted({*list_folders(self.directory), *list_torchvision(self.directory)}))

    def held_text(self) -> str:
        """Return what the directory holds, for an error; where it is a data set itself, what to name instead."""
        if held := self.held():
            return ", ".join(held)
        path = self.directory.resolve()
        if holds_parquet(path):
            return f"no data set, because it is one itself: name its parent {path.parent}, and {path.name} as domain"
        return "no data set"

    def read(self, name: str) -> Source:
        """Read a data set: the Parquet folder where there is one, else torchvision's files.

        Raises:
            DataError: The directory holds neither (and a download is not allowed or not possible), or they are broken.
        """
        directory, note = self.directory, NOTES.get(name, "")
        if name in list_folders(directory):
            return read_folder(directory, name, self.image_size, self.cache_dir).with_note(note)
        if name in list_torchvision(directory) or (name in SETS and self.config.download):
            return read_torchvision(
                directory, name, self.image_size, download=self.config.download, cache_dir=self.cache_dir
            ).with_note(note)
        held = self.held_text()
        hint = " torchvision can download it: --download (data.download)." if name in SETS else ""
        raise DataError(
            f"Data set {name!r} is not in {directory}, which holds {held}. Expected {directory / name}/train-*.parquet "
            f"and test-*.parquet.{hint}"
        )

    def wanted(self, known: Sequence[str]) -> tuple[str, ...]:
        """Return the configured domains, checked against a benchmark's own.

        Raises:
            DataError: One is named twice or is none of ``known``.
        """
        wanted = self.config.domains
        for name in wanted:
            if wanted.count(name) > 1:
                raise DataError(f"data.domains names {name!r} more than once: {', '.join(wanted)}.")
            if known and name not in known:
                raise DataError(
                    f"{self.config.name} has no domain {name!r}; its domains: {', '.join(known)}. "
                    "Any folder can be a domain of the benchmark 'folders'."
                )
        return wanted


@dataclass(frozen=True, kw_only=True)
class Benchmark(Card):
    """The identity card of a benchmark.

    Attributes:
        load: Reads it.
        note: What must be known before its numbers are reported.
        sizes: Of each data set that it reads: the classes, and training and test images of each domain, as published;
            for estimates of time without the files.
    """

    load: Callable[[Reader], Loaded]
    note: str = ""
    sizes: Mapping[str, tuple[int, Mapping[str, tuple[int, int]]]] = field(default_factory=dict)

    expects: ClassVar[str] = (
        f"Data is {own.FORMS}; a callable that returns one, without arguments or from a reader; or a Benchmark."
    )

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return a card for data in one of the forms of :mod:`fednorm.data.own`, or for a callable that returns some.

        Data of this process alone is read at once, and named by its content; data at an import path is read when a run
        asks for it.

        Raises:
            DataError: Data of this process is unfit.
        """
        is_data = own.is_data(method)
        if not is_data and (not callable(method) or _takes_reader(method) is None):
            return None
        summary = (getattr(method, "__doc__", None) or "").strip().partition("\n")[0] if not is_data else ""
        if not reference.startswith((IN_PROCESS, "__main__:")):
            module = getattr(method, "__module__", None) if callable(method) else None
            origin = str(module or reference.partition(":")[0])
            return cls(name=reference, summary=summary, load=_Own(method, reference).load, origin=origin)
        name = f"{IN_PROCESS}{reference.partition(':')[2]}"
        if not is_data and _takes_reader(method):
            name = f"{name}-{_token(method)}"
            return cls(name=name, summary=summary, load=_Own(method, name).load)
        given = method if is_data else _called(method, (), reference)
        if isinstance(given, Loaded):
            return cls(name=f"{name}-{_token(method)}", summary=summary, load=_Own(method, name).load)
        parts = own.gather(given)
        name = f"{name}-{own.digest(parts)}"
        return cls(name=name, summary=summary, load=_Own(method, name, parts).load)

    @property
    def ships(self) -> bool:
        """Whether it is one of fednorm's own, and not what somebody gave."""
        return self.origin.startswith("fednorm.data.sets.")

    def read(self, reader: Reader) -> Loaded:
        """Read the data; what somebody gave is checked, and every pixel of it enters the data's digest.

        Raises:
            DataError: It is missing, corrupt, or not what a benchmark is.
        """
        if self.ships:
            return self.load(reader)
        try:
            given = self.load(reader)
        except FedNormError:
            raise
        except Exception as error:
            raise _raised(self.name, error) from error
        return _checked(given, self.name, reader.image_size)


@dataclass(frozen=True, eq=False)
class _Own:
    """Data that somebody gave.

    Attributes:
        given: The data, or the callable that returns it.
        name: Its reference.
        parts: What it holds, where it was read already.
    """

    given: Any
    name: str
    parts: tuple[own.Part, ...] = ()

    def load(self, reader: Reader) -> Loaded:
        """Return its domains at the reader's image size."""
        given, parts = self.given, self.parts
        if not parts:
            if not own.is_data(given):
                given = _called(given, (reader,) if _takes_reader(given) else (), self.name)
            if isinstance(given, Loaded):
                return given
            parts = own.gather(given)
        known = tuple(dict.fromkeys(part.domain for part in parts))
        wanted = reader.wanted(known) or known
        title = "own data" if in_process(self.name) else self.name
        source, num_classes, notes = own.one_source(
            [part for part in parts if part.domain in wanted],
            name=title,
            image_size=reader.image_size,
            split_seed=reader.config.split_seed,
        )
        return Loaded(f"{title} ({', '.join(wanted)})", num_classes, source.split_domains(wanted), notes)


def _takes_reader(maker: Callable[..., Any]) -> bool | None:
    """Return whether a callable is given the reader: its one required argument, or its first, of that name.

    None where it needs more than that.
    """
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):  # compiled, and says nothing of itself
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1 or any(p.kind is p.KEYWORD_ONLY for p in needed):
        return None
    return bool(needed) or bool(places and places[0].name == "reader")


_TOKENS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _token(maker: Callable[..., Any]) -> str:
    """Return what tells a callable of this process from all others, since what it returns is not known."""
    try:
        return _TOKENS.setdefault(maker, uuid.uuid4().hex[:12])
    except TypeError:
        return uuid.uuid4().hex[:12]


def _called(maker: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Any:
    """Return what a callable returns.

    Raises:
        DataError: It raised, or returned no data.
    """
    try:
        given = maker(*arguments)
    except FedNormError:
        raise
    except Exception as error:
        raise _raised(name, error) from error
    if own.is_data(given) or isinstance(given, Loaded):
        return given
    raise DataError(f"{name} returned a {type(given).__name__}; expected {own.FORMS}.")


def _raised(name: str, error: Exception) -> DataError:
    return DataError(f"Reading the data {name} raised {type(error).__name__}: {error}. Mend what reads it.")


def _checked(given: Any, name: str, size: int) -> Loaded:
    """Return what a stranger's benchmark found, each domain in one array that brings a digest of its pixels along.

    Raises:
        DataError: It is not what :class:`Loaded` says.
    """
    if not isinstance(given, Loaded) or not given.domains:
        raise DataError(f"{name} returned {given!r:.60}; expected a Loaded with one domain or more.")
    digests: dict[int, str] = {}
    domains = [_one_array(domain) for domain in given.domains]
    for domain in domains:
        _check_domain(domain, f"Domain {domain.name} of {name}", given.num_classes, size)
        images = domain.train.images
        if images.data_ptr() not in digests:
            digests[images.data_ptr()] = hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:16]
    named = [
        replace(
            domain,
            train=replace(domain.train, content=digests[domain.train.images.data_ptr()]),
            test=replace(domain.test, content=digests[domain.train.images.data_ptr()]),
        )
        for domain in domains
    ]
    return replace(given, domains=tuple(named))


def _one_array(domain: Domain) -> Domain:
    """Return a domain whose training and test images are rows of one array, which all that splits anew relies on."""
    train, test = domain.train, domain.test
    if train.images.data_ptr() == test.images.data_ptr() and train.labels.data_ptr() == test.labels.data_ptr():
        return domain
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    return replace(
        domain,
        train=Split(images, labels, train.index),
        test=Split(images, labels, test.index + len(train.images)),
    )


def _check_domain(domain: Domain, where: str, num_classes: int, size: int) -> None:
    for split, part in (("training", domain.train), ("test", domain.test)):
        images, labels, index = part.images, part.labels, part.index
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, size, size):
            raise DataError(
                f"{where}: the {split} images are {str(images.dtype).removeprefix('torch.')} of shape "
                f"{tuple(images.shape)}; expected uint8 of shape (N, 3, {size}, {size}), {size} being the reader's "
                "image_size."
            )
        if labels.dtype != torch.int64 or index.dtype != torch.int64 or len(labels) != len(images):
            raise DataError(f"{where}: labels and index of the {split} images must be int64, with a label an image.")
        if not len(index):
            raise DataError(f"{where} has no {split} images; a domain needs both.")
        if int(index.min()) < 0 or int(index.max()) >= len(images):
            raise DataError(f"{where}: the index of the {split} images goes beyond the {len(images)} images.")
        low, high = int(part.targets.min()), int(part.targets.max())
        if low < 0 or high >= num_classes:
            raise DataError(f"{where} has {split} labels from {low} to {high}, outside 0 to {num_classes - 1}.")


def loaded(title: str, sources: Sequence[Source], domains: tuple[Domain, ...], notes: tuple[str, ...] = ()) -> Loaded:
    """Return what a benchmark found, under a title that names its domains.

    Raises:
        DataError: Two domains have one name.
    """
    names = [domain.name for domain in domains]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"Domain {', '.join(repeated)} is there more than once; every domain needs a name of its own.")
    own = tuple(dict.fromkeys(source.note for source in sources if source.note))
    named = next((source.class_names for source in sources if source.class_names), ())
    return Loaded(f"{title} ({', '.join(names)})", count_classes(sources), domains, (*own, *notes), named)


def with_domains(reader: Reader, source: Source) -> Source:
    """Return a data set that must have a column of domains.

    Raises:
        DataError: It has none.
    """
    if source.domains is None:
        raise DataError(f"{reader.directory / source.name} has no column 'domain', which says each image's domain.")
    return source


def one_domain(name: str, title: str) -> Callable[[Reader], Loaded]:
    """Return what reads a data set as one domain."""

    def load(reader: Reader) -> Loaded:
        reader.wanted((name,))
        source = reader.read(name)
        return loaded(title, [source], source.split_domains())

    return load


def several_domains(name: str, title: str, *notes: str) -> Callable[[Reader], Loaded]:
    """Return what reads a data set with a column of domains, or those of them that ``data.domains`` names.

    Args:
        name: The data set's.
        title: How a table names it.
        notes: Sentences that belong under a table.
    """

    def load(reader: Reader) -> Loaded:
        source = with_domains(reader, reader.read(name))
        return loaded(title, [source], source.split_domains(reader.wanted(())), notes)

    return load
