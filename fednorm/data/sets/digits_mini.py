"""digits_mini: the embedded stand-in, made by :mod:`fednorm.data.digits_mini`."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.digits_mini import DOMAINS, read_digits_mini


def _mini(reader: Reader) -> Loaded:
    source = read_digits_mini(reader.image_size, reader.cache_dir)
    wanted = reader.wanted(DOMAINS) or DOMAINS
    note = "digits-mini: small embedded images made from what installed packages carry; a stand-in, not Digits-Five."
    return loaded("digits-mini", [source], source.split_domains(wanted), (note,))


SPEC = Benchmark(
    name="digits_mini",
    summary="five small embedded digit domains, 28x28: scans, photo, fonts, street, faint; needs no folder",
    note="A small stand-in made from installed packages; never to be reported as Digits-Five.",
    load=_mini,
)
