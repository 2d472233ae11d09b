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
from fednorm.continual.dealing import Classes, class_incremental
from fednorm.continual.spec import ScenarioSpec
from fednorm.continual.stream import Stream
from fednorm.data.benchmarks import Reader


def make(
    reader: Reader,
    seed: int,
    *,
    num_experiences: int = 5,
    classes_per_experience: Classes = "",
    class_order: str = "shuffled",
    order_seed: int | str = "run",
    train_per_experience: int = 0,
    test_per_experience: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T; where it does not divide the number of classes, the first experiences have one more.
        classes_per_experience: In place of T: a number of classes, or one for each experience, as ``"4,3,3"``.
        class_order: ``shuffled`` by the seed, or ``sorted``.
        order_seed: Of the class order: ``run`` for the run's seed, or a number.
        train_per_experience: Most training images an experience; 0 for all.
        test_per_experience: Most test images an experience; 0 for all.

    Raises:
        ConfigError: More experiences than classes, or numbers of classes that do not sum up to all of them.
        DataError: The data is missing or corrupt.
    """
    return class_incremental(
        "split_cifar10",
        reader,
        seed,
        num_experiences=num_experiences,
        classes_per_experience=classes_per_experience,
        class_order=class_order,
        order_seed=order_seed,
        train=train_per_experience,
        test=test_per_experience,
        usual=5,
    )


SPEC = ScenarioSpec(
    name="split_cifar10",
    summary="CIFAR-10 in five experiences of two classes each.",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=make,
    data=("cifar10",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
