"""digits: the digit data sets that a folder holds, each a domain.

Digits-Five is FedBN's set of five (Li et al., https://arxiv.org/abs/2102.07623): mnist, svhn, usps, syn, mnistm.
"""

from __future__ import annotations

from fednorm.data.benchmarks import Benchmark, Loaded, Reader, loaded
from fednorm.data.source import align_classes
from fednorm.data.torchvision_sets import SETS
from fednorm.errors import DataError

DIGITS = ("mnist", "usps", "mnistm", "synthdigits", "streetdigits", "svhn", "syn")
"""The digit data sets that ``digits`` looks for, in this order."""

DIGITS_FIVE = frozenset({"mnist", "svhn", "usps", "syn", "mnistm"})
"""The five domains of Digits-Five as in FedBN (Li et al., arXiv 2102.07623)."""


def _digits(reader: Reader) -> Loaded:
    names = reader.wanted(DIGITS)
    if not names:
        held = {*reader.held(), *(SETS if reader.config.download else ())}
        names = tuple(name for name in DIGITS if name in held)
    if not names:
        raise DataError(f"{reader.directory} holds none of {', '.join(DIGITS)}; it holds {reader.held_text()}.")
    sources, notes = align_classes([reader.read(name) for name in names])
    title = "Digits-Five" if frozenset(names) == DIGITS_FIVE else "digits"
    return loaded(title, sources, tuple(domain for source in sources for domain in source.split_domains()), notes)


SPEC = Benchmark(
    name="digits",
    summary=f"the digit data sets that the folder holds, of {', '.join(DIGITS)}",
    note="Called Digits-Five only with exactly the paper's mnist, svhn, usps, syn, mnistm. "
    "synthdigits and streetdigits stand in for SYN and SVHN and are neither; "
    "mnistm's digits are mnist's (train with train, test with test).",
    sizes={
        "mnist": (10, {"": (60_000, 10_000)}),
        "usps": (10, {"": (7_291, 2_007)}),
        "svhn": (10, {"": (73_257, 26_032)}),
        "syn": (10, {"": (479_400, 9_553)}),
        "mnistm": (10, {"": (59_001, 9_001)}),
    },
    load=_digits,
)
