"""folders: any Parquet folders, each a domain."""

from __future__ import annotations

from collections.abc import Sequence

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.domain import Domain
from fednorm.data.source import align_classes
from fednorm.errors import DataError


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
    return loaded("folders", aligned, tuple(domains), notes)


def _folder_and_part(name: str, held: Sequence[str]) -> tuple[str, str]:
    """Return a domain's folder and, for ``FOLDER.VALUE``, the value of its domain column."""
    if "." not in name or name in held:
        return name, ""
    folder, _, part = name.rpartition(".")
    return folder, part


SPEC = Benchmark(
    name="folders",
    summary="any Parquet folders, named in data.domains, each a domain; FOLDER.VALUE for one value of a domain column",
    note="Labels are 0 to K - 1 and mean the same in all of them.",
    load=_folders,
)
