"""split_cifar10: CIFAR-10 in five experiences of two classes each, class-incremental.

Splitting a data set's classes into tasks: Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence.
ICML 2017. https://arxiv.org/abs/1703.04200 (there CIFAR-10 followed by parts of CIFAR-100). Five tasks of two classes,
tested over all classes without being told the task, are the usual Split CIFAR-10 of the replay literature, e.g. Buzzega
et al., https://arxiv.org/abs/2004.07211.

The class order is drawn from the seed, so that a mean over seeds is one over orders too; with
``class_order="sorted"`` it is 0 to 9, as in mammoth, whose code AdaB2N's is built on.

Brings along the slim ResNet-18 of online continual learning (20 channels) and its random crop and flip.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.streams.dealing import splits
from fednorm.streams.spec import ScenarioSpec

SPEC = ScenarioSpec(
    name="split_cifar10",
    summary="CIFAR-10 in five experiences of two classes each.",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=splits("split_cifar10", usual=5),
    data=("cifar10",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
