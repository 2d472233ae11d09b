"""domain_digits: all ten digits in every experience, one domain after another.

The domain-incremental setting of van de Ven, Tolias. Three scenarios for continual learning. 2019.
https://arxiv.org/abs/1904.07734: the classes stay, the inputs' distribution changes, and the task is not told. The
domains are those of ``digits_mini`` (embedded) or ``digits`` (real data), of the other benchmarks with several domains,
or of data of your own.

A domain's images are all in one experience, and none of them in another; ``mnistm`` is made from ``mnist``'s digits,
though, which the stream's notes say where it matters.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.domains import domains
from fednorm.streams.spec import ScenarioSpec

make = domains("domain_digits")

SPEC = ScenarioSpec(
    name="domain_digits",
    summary="All ten digits in every experience, one domain after another.",
    citation=Citation(
        title="Three scenarios for continual learning",
        authors="van de Ven, Tolias",
        year=2019,
        arxiv="1904.07734",
    ),
    make=make,
    data=(
        "digits_mini",
        "digits",
        "digits_five",
        "office_caltech10",
        "officehome",
        "domainnet",
        "pacs",
        "camelyon17",
        "cifar10_c",
        "core50",
        "clear10",
        "folders",
        "image_folders",
    ),
    defaults={"model": {"name": "digits_cnn", "width": 16}},
)
