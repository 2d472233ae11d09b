"""split: the classes of any data set in experiences of a few each, class-incremental.

Splitting a data set's classes into tasks: Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence.
ICML 2017. https://arxiv.org/abs/1703.04200. With ``--data folders --set data.domains=mnist`` it is Split MNIST (five
experiences of two digits), with a folder of Tiny-ImageNet and ``num_experiences=10`` Split Tiny-ImageNet (Buzzega et
al., https://arxiv.org/abs/2004.07211), and so on for a data set of one's own: a folder of Parquet files with labels 0
to K - 1. ``classes_per_experience="50,10,10,10,10,10"`` is the protocol that begins with half of 100 classes (Hou et
al., CVPR 2019).

Images are resized to the model's input size unless ``data.image_size`` says otherwise: 28 for MNIST, 64 for
Tiny-ImageNet. Brings along the slim ResNet-18 of online continual learning (20 channels), which takes any image size,
and no augmentation: whether an image may be mirrored depends on what it shows.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split",
    summary="The classes of any data set, a few an experience; --data says which (folders for one's own).",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=splits("split", usual=0),
    defaults={"model": {"name": "resnet18", "width": 20}},
)
