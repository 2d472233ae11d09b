"""split_mini_imagenet: mini-ImageNet in ten experiences of ten classes each, class-incremental.

The protocol of Mai, Li, Jeong, Quispe, Kim, Sanner. Online Continual Learning in Image Classification: An Empirical
Survey. 2021. https://arxiv.org/abs/2101.10423; in twenty of five (``num_experiences=20``) it is that of Aljundi et al.,
https://arxiv.org/abs/1908.04742. ``fednorm data prepare mini-imagenet`` makes the data; its images are of 84 x 84
pixels (``data.image_size=84``).
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split_mini_imagenet",
    summary="mini-ImageNet in ten experiences of ten classes each, or twenty of five (num_experiences).",
    citation=Citation(
        title="Online Continual Learning in Image Classification: An Empirical Survey",
        authors="Mai, Li, Jeong, Quispe, Kim, Sanner",
        year=2021,
        arxiv="2101.10423",
    ),
    make=splits("split_mini_imagenet", usual=10),
    data=("mini_imagenet",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
