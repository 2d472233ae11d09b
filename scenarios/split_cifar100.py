"""split_cifar100: CIFAR-100 in ten experiences of ten classes each, class-incremental.

Rebuffi, Kolesnikov, Sperl, Lampert. iCaRL: Incremental Classifier and Representation Learning. CVPR 2017.
https://arxiv.org/abs/1611.07725, where the order of the classes is random as well. ``num_experiences=20`` is the other
usual one, of five classes each.
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
    num_experiences: int = 10,
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
        "split_cifar100",
        reader,
        seed,
        num_experiences=num_experiences,
        classes_per_experience=classes_per_experience,
        class_order=class_order,
        order_seed=order_seed,
        train=train_per_experience,
        test=test_per_experience,
        usual=10,
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
