"""The benchmarks: which data sets are the domains, what a table calls them, and what it must say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fednorm.config import DataConfig
from fednorm.data.digits_mini import DOMAINS as MINI_DOMAINS
from fednorm.data.digits_mini import read_digits_mini
from fednorm.data.domain import Domain
from fednorm.data.folders import list_folders, read_folder
from fednorm.data.shards import holds_parquet
from fednorm.data.source import Source, align_classes, count_classes
from fednorm.data.torchvision_sets import SETS, list_torchvision, read_torchvision
from fednorm.errors import DataError

DIGITS = ("mnist", "usps", "mnistm", "synthdigits", "streetdigits", "svhn", "syn")
"""The digit data sets that ``digits`` looks for, in this order."""

DIGITS_FIVE = frozenset({"mnist", "svhn", "usps", "syn", "mnistm"})
"""The five domains of Digits-Five as in FedBN (Li et al., arXiv 2102.07623)."""

PACS_DOMAINS = frozenset({"art_painting", "cartoon", "photo", "sketch"})

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


@dataclass(frozen=True)
class Benchmark:
    """One entry of ``fednorm list data``.

    Attributes:
        name: The benchmark's name.
        summary: What it is, in a line.
        note: What must be known before its numbers are reported.
        load: Reads it.
    """

    name: str
    summary: str
    note: str
    load: Callable[[Reader], Loaded]


def _digits(reader: Reader) -> Loaded:
    names = reader.wanted(DIGITS)
    if not names:
        held = {*reader.held(), *(SETS if reader.config.download else ())}
        names = tuple(name for name in DIGITS if name in held)
    if not names:
        raise DataError(f"{reader.directory} holds none of {', '.join(DIGITS)}; it holds {reader.held_text()}.")
    sources, notes = align_classes([reader.read(name) for name in names])
    title = "Digits-Five" if frozenset(names) == DIGITS_FIVE else "digits"
    return _loaded(title, sources, tuple(domain for source in sources for domain in source.split_domains()), notes)


def _one(name: str, title: str) -> Callable[[Reader], Loaded]:
    def load(reader: Reader) -> Loaded:
        reader.wanted((name,))
        source = reader.read(name)
        return _loaded(title, [source], source.split_domains())

    return load


def _office(reader: Reader) -> Loaded:
    source = _with_domains(reader, reader.read("office_caltech10"))
    note = "Office-Caltech-10: the train/test split is the folder's own, not that of FedBN's files."
    return _loaded("Office-Caltech-10", [source], source.split_domains(reader.wanted(())), (note,))


def _pacs(reader: Reader) -> Loaded:
    folder = next((name for name in ("pacs", "pacs3") if name in reader.held()), "pacs")
    source = _with_domains(reader, reader.read(folder))
    domains = source.split_domains(reader.wanted(()))
    missing = sorted(PACS_DOMAINS - {domain.name for domain in domains})
    note = f"PACS without {', '.join(missing)}: not comparable with numbers on all four domains."
    return _loaded("PACS", [source], domains, (note,) if missing else ())


def _with_domains(reader: Reader, source: Source) -> Source:
    if source.domains is None:
        raise DataError(f"{reader.directory / source.name} has no column 'domain', which says each image's domain.")
    return source


def _folders(reader: Reader) -> Loaded:
    wanted = reader.wanted(())
    if not wanted:
        raise DataError(
            f"Benchmark folders needs data.domains, the folders to use (--domains a,b,c); {reader.directory} holds "
            f"{reader.held_text()}."
        )
    held = reader.held()
    parts = [_folder_and_part(name, held) for name in wanted]
    folders = tuple(dict.fromkeys(folder for folder, _ in parts))
    aligned, notes = align_classes([reader.read(folder) for folder in folders])
    sources = dict(zip(folders, aligned, strict=True))
    domains: list[Domain] = []
    for folder, part in parts:
        domains.extend(sources[folder].split_domains([part] if part else (), prefix=f"{folder}."))
    return _loaded("folders", aligned, tuple(domains), notes)


def _folder_and_part(name: str, held: Sequence[str]) -> tuple[str, str]:
    """Return a domain's folder and, for ``FOLDER.VALUE``, the value of its domain column."""
    if "." not in name or name in held:
        return name, ""
    folder, _, part = name.rpartition(".")
    return folder, part


def _mini(reader: Reader) -> Loaded:
    source = read_digits_mini(reader.image_size, reader.cache_dir)
    wanted = reader.wanted(MINI_DOMAINS) or MINI_DOMAINS
    note = "digits-mini: small embedded images made from what installed packages carry; a stand-in, not Digits-Five."
    return _loaded("digits-mini", [source], source.split_domains(wanted), (note,))


def _loaded(title: str, sources: Sequence[Source], domains: tuple[Domain, ...], notes: tuple[str, ...] = ()) -> Loaded:
    names = [domain.name for domain in domains]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"Domain {', '.join(repeated)} is there more than once; every domain needs a name of its own.")
    own = tuple(dict.fromkeys(source.note for source in sources if source.note))
    return Loaded(f"{title} ({', '.join(names)})", count_classes(sources), domains, (*own, *notes))


BENCHMARKS: Mapping[str, Benchmark] = {
    entry.name: entry
    for entry in (
        Benchmark(
            "digits_mini",
            "five small embedded digit domains, 28x28: scans, photo, fonts, street, faint; needs no folder",
            "A small stand-in made from installed packages; never to be reported as Digits-Five.",
            _mini,
        ),
        Benchmark(
            "digits",
            f"the digit data sets that the folder holds, of {', '.join(DIGITS)}",
            "Called Digits-Five only with exactly the paper's mnist, svhn, usps, syn, mnistm. "
            "synthdigits and streetdigits stand in for SYN and SVHN and are neither; "
            "mnistm's digits are mnist's (train with train, test with test).",
            _digits,
        ),
        Benchmark(
            "office_caltech10",
            "Office-Caltech-10: amazon, caltech10, dslr, webcam; ten classes",
            "webcam and dslr show the same objects from several views.",
            _office,
        ),
        Benchmark(
            "pacs",
            "PACS from the folder pacs or pacs3: the domains it holds of art_painting, cartoon, photo, sketch",
            "Without sketch it is not comparable with published four-domain numbers.",
            _pacs,
        ),
        Benchmark(
            "cifar10",
            "CIFAR-10 as one domain, for label skew: set data.clients_per_domain and data.partition",
            "",
            _one("cifar10", "CIFAR-10"),
        ),
        Benchmark(
            "cifar100",
            "CIFAR-100 (100 fine classes) as one domain, for label skew",
            "Ten images are in both train and test, as in the original.",
            _one("cifar100", "CIFAR-100"),
        ),
        Benchmark(
            "folders",
            "any Parquet folders, named in data.domains, each a domain; FOLDER.VALUE for one value of a domain column",
            "Labels are 0 to K - 1 and mean the same in all of them.",
            _folders,
        ),
    )
}
"""The benchmarks by name."""
