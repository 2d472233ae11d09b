"""domain_clear10: CLEAR-10: the same eleven classes in photographs of 2004 to 2014, one bucket of time after another.

Lin, Shi, Pathak, Ramanan. The CLEAR Benchmark: Continual LEArning on Real-World Imagery. NeurIPS 2021.
https://arxiv.org/abs/2201.06289. The order is that of time, whatever the seed (``domain_order=shuffled`` draws it); its
protocols are read off the accuracy matrix: next-domain accuracy is the diagonal above the main one.
``fednorm data prepare clear10`` makes the data.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.domains import domains
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="domain_clear10",
    summary="CLEAR-10: eleven classes in ten buckets of photographs, in the order of time.",
    citation=Citation(
        title="The CLEAR Benchmark: Continual LEArning on Real-World Imagery",
        authors="Lin, Shi, Pathak, Ramanan",
        year=2021,
        arxiv="2201.06289",
    ),
    make=domains("domain_clear10", usual="given"),
    data=("clear10",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
