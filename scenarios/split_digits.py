"""split_digits: the embedded ``digits_mini`` in five experiences of two digits each, class-incremental.

The Split MNIST of Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence. ICML 2017.
https://arxiv.org/abs/1703.04200, on the small embedded images, so that a demonstration and the tests need no folder.
It is a stand-in: its numbers are not Split MNIST's. Every experience has images of all the domains of ``digits_mini``
(or of those in ``data.domains``).
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
        "split_digits",
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
    name="split_digits",
    summary="The embedded digits in five experiences of two digits each; needs no folder.",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=make,
    data=("digits_mini",),
    defaults={"model": {"name": "digits_cnn", "width": 16}},
)
