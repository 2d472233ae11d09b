"""folders: any Parquet folders, each a domain."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.domain import Domain
from fednorm.data.source import Source
from fednorm.errors import DataError


def _folders(reader: Reader) -> Loaded:
    wanted = reader.wanted(())
    if not wanted:
        raise DataError(
            f"Benchmark folders needs data.domains, the folders to use (--domains a,b,c); {reader.directory} holds "
            f"{', '.join(reader.held()) or 'no data set'}."
        )
    sources: dict[str, Source] = {}
    domains: list[Domain] = []
    for name in wanted:
        folder, part = name, ""
        if "." in name and name not in reader.held():
            folder, _, part = name.rpartition(".")
        if folder not in sources:
            sources[folder] = reader.read(folder)
        domains.extend(sources[folder].split_domains([part] if part else (), prefix=f"{folder}."))
    return loaded("folders", list(sources.values()), tuple(domains))


SPEC = Benchmark(
    name="folders",
    summary="any Parquet folders, named in data.domains, each a domain; FOLDER.VALUE for one value of a domain column",
    note="Labels are 0 to K - 1 and mean the same in all of them.",
    load=_folders,
)
