"""split_cifar100: CIFAR-100 in ten experiences of ten classes each, class-incremental.

Rebuffi, Kolesnikov, Sperl, Lampert. iCaRL: Incremental Classifier and Representation Learning. CVPR 2017.
https://arxiv.org/abs/1611.07725, where the order of the classes is random as well. ``num_experiences=20`` is the other
usual one, of five classes each.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split_cifar100",
    summary="CIFAR-100 in ten experiences of ten classes each, or twenty of five (num_experiences).",
    citation=Citation(
        title="iCaRL: Incremental Classifier and Representation Learning",
        authors="Rebuffi, Kolesnikov, Sperl, Lampert",
        year=2017,
        arxiv="1611.07725",
    ),
    make=splits("split_cifar100", usual=10),
    data=("cifar100",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
