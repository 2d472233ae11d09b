"""domain_core50: CORe50's new instances (NI): all fifty objects in every experience, one session after another.

Lomonaco, Maltoni. CORe50: a New Dataset and Benchmark for Continuous Object Recognition. CoRL 2017.
https://arxiv.org/abs/1705.03550. Eight training sessions, in an order that is drawn from the seed (published runs have
ten orders of their own); every experience is tested on the images of all three test sessions, which no training has.
``fednorm data prepare core50`` makes the data.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.domains import domains
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="domain_core50",
    summary="CORe50's new instances: fifty objects in every experience, one session after another.",
    citation=Citation(
        title="CORe50: a New Dataset and Benchmark for Continuous Object Recognition",
        authors="Lomonaco, Maltoni",
        year=2017,
        arxiv="1705.03550",
    ),
    make=domains("domain_core50"),
    data=("core50",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
