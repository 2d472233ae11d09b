"""split_cifar100: CIFAR-100 in ten experiences of ten classes each, class-incremental.

Rebuffi, Kolesnikov, Sperl, Lampert. iCaRL: Incremental Classifier and Representation Learning. CVPR 2017.
https://arxiv.org/abs/1611.07725, where the order of the classes is random as well. ``num_experiences=20`` is the other
usual one, of five classes each.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.continual.dealing import class_incremental
from fednorm.continual.spec import ScenarioSpec
from fednorm.continual.stream import Stream
from fednorm.data.benchmarks import Reader


def make(
    reader: Reader,
    seed: int,
    *,
    num_experiences: int = 10,
    class_order: str = "shuffled",
    train_per_experience: int = 0,
    test_per_experience: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T; it must divide the number of classes.
        class_order: ``shuffled`` by the seed, or ``sorted``.
        train_per_experience: Most training images an experience; 0 for all.
        test_per_experience: Most test images an experience; 0 for all.

    Raises:
        ConfigError: More experiences than classes, or a number that does not divide them.
        DataError: The data is missing or corrupt.
    """
    return class_incremental(
        "split_cifar100",
        reader,
        seed,
        num_experiences=num_experiences,
        class_order=class_order,
        train=train_per_experience,
        test=test_per_experience,
    )


SPEC = ScenarioSpec(
    name="split_cifar100",
    summary="CIFAR-100 in ten experiences of ten classes each, or twenty of five (num_experiences).",
    citation=Citation(
        title="iCaRL: Incremental Classifier and Representation Learning",
        authors="Rebuffi, Kolesnikov, Sperl, Lampert",
        year=2017,
        arxiv="1611.07725",
    ),
    make=make,
    data=("cifar100",),
    defaults={"model": {"name": "resnet18", "width": 20}, "train": {"augment": "crop_flip"}},
)
