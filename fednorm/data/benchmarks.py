"""What a benchmark is, and what reads its data sets; the benchmarks themselves stand in :mod:`fednorm.data.sets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fednorm.cards import Card
from fednorm.config import DataConfig
from fednorm.data.domain import Domain
from fednorm.data.folders import list_folders, read_folder
from fednorm.data.shards import holds_parquet
from fednorm.data.source import Source, count_classes
from fednorm.data.torchvision_sets import SETS, list_torchvision, read_torchvision
from fednorm.errors import DataError

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
    """

    title: str
    num_classes: int
    domains: tuple[Domain, ...]
    notes: tuple[str, ...] = ()


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
    """

    load: Callable[[Reader], Loaded]
    note: str = ""

    expects: ClassVar[str] = "A benchmark is a callable (reader) -> Loaded, or a Benchmark."


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
    return Loaded(f"{title} ({', '.join(names)})", count_classes(sources), domains, (*own, *notes))


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
