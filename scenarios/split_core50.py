"""split_core50: CORe50's new classes (NC): nine experiences, the first of ten objects, the others of five.

Lomonaco, Maltoni. CORe50: a New Dataset and Benchmark for Continuous Object Recognition. CoRL 2017.
https://arxiv.org/abs/1705.03550. Each experience has the eight training sessions of its objects and is tested on the
three test sessions of them. The order of the objects is drawn from the seed; the ten published orders are not those.
``fednorm data prepare core50`` makes the data.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split_core50",
    summary="CORe50's new classes: nine experiences, of ten objects and then five each.",
    citation=Citation(
        title="CORe50: a New Dataset and Benchmark for Continuous Object Recognition",
        authors="Lomonaco, Maltoni",
        year=2017,
        arxiv="1705.03550",
    ),
    make=splits("split_core50", usual=9, sizes="10,5,5,5,5,5,5,5,5"),
    data=("core50",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
