"""digits_five: Digits-Five, exactly its five domains. Peng et al., https://arxiv.org/abs/1812.01754."""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.source import align_classes

FIVE = ("mnist", "svhn", "usps", "syn", "mnistm")
"""The domains in FedBN's order."""


def _digits_five(reader: Reader) -> Loaded:
    names = reader.wanted(FIVE) or FIVE
    sources, notes = align_classes([reader.read(name) for name in names])
    domains = tuple(domain for source in sources for domain in source.split_domains())
    return loaded("Digits-Five" if set(names) == set(FIVE) else "of Digits-Five", sources, domains, notes)


SPEC = Benchmark(
    name="digits_five",
    summary="Digits-Five: mnist, svhn, usps, syn, mnistm, and nothing that stands in for them",
    note="Made by fednorm data prepare digits_five; mnistm's digits are mnist's (train with train, test with test).",
    load=_digits_five,
)
