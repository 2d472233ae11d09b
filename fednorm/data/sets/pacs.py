"""pacs: four domains of seven classes. Li, Yang, Song, Hospedales, https://arxiv.org/abs/1710.03077."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded, with_domains

PACS_DOMAINS = frozenset({"art_painting", "cartoon", "photo", "sketch"})


def _pacs(reader: Reader) -> Loaded:
    folder = next((name for name in ("pacs", "pacs3") if name in reader.held()), "pacs")
    source = with_domains(reader, reader.read(folder))
    domains = source.split_domains(reader.wanted(()))
    missing = sorted(PACS_DOMAINS - {domain.name for domain in domains})
    note = f"PACS without {', '.join(missing)}: not comparable with numbers on all four domains."
    return loaded("PACS", [source], domains, (note,) if missing else ())


SPEC = Benchmark(
    name="pacs",
    summary="PACS from the folder pacs or pacs3: the domains it holds of art_painting, cartoon, photo, sketch",
    note="Without sketch it is not comparable with published four-domain numbers.",
    load=_pacs,
)
