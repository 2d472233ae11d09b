"""split_tiny_imagenet: Tiny-ImageNet in ten experiences of twenty classes each, class-incremental.

The protocol of Buzzega, Boschini, Porrello, Abati, Calderara. Dark Experience for General Continual Learning: a Strong,
Simple Baseline. NeurIPS 2020. https://arxiv.org/abs/2004.07211. ``fednorm data prepare tiny-imagenet`` makes the data.
Images are resized to the model's input size unless ``data.image_size`` says otherwise: 64 for the published protocol.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split_tiny_imagenet",
    summary="Tiny-ImageNet in ten experiences of twenty classes each.",
    citation=Citation(
        title="Dark Experience for General Continual Learning",
        authors="Buzzega, Boschini, Porrello, Abati, Calderara",
        year=2020,
        arxiv="2004.07211",
    ),
    make=splits("split_tiny_imagenet", usual=10),
    data=("tiny_imagenet",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
