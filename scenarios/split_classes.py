"""split_classes: the classes of any data in experiences of a few each, class-incremental.

Splitting a data set's classes into tasks: Zenke, Poole, Ganguli. Continual Learning Through Synaptic Intelligence.
ICML 2017. https://arxiv.org/abs/1703.04200. The data is what ``data.name`` names, data of one's own among it; every
experience has images of all of its domains.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.continual.dealing import class_incremental
from fednorm.continual.spec import ScenarioSpec
from fednorm.continual.stream import Stream
from fednorm.data.benchmarks import Reader
from fednorm.options import whole


def make(
    reader: Reader,
    seed: int,
    *,
    num_experiences: int = 0,
    class_order: str = "shuffled",
    train_per_experience: int = 0,
    test_per_experience: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T; it must divide the number of classes. 0 for the most experiences of two classes or more
            each, or of one class each where the classes cannot be cut so.
        class_order: ``shuffled`` by the seed, or ``sorted``.
        train_per_experience: Most training images an experience; 0 for all.
        test_per_experience: Most test images an experience; 0 for all.

    Raises:
        ConfigError: More experiences than classes, or a number that does not divide them.
        DataError: The data is missing or corrupt, or several data sets.
    """
    whole("scenario", "num_experiences", num_experiences, at_least=0)
    return class_incremental(
        "split_classes",
        reader,
        seed,
        num_experiences=num_experiences or _most,
        class_order=class_order,
        train=train_per_experience,
        test=test_per_experience,
    )


def _most(num_classes: int) -> int:
    """Return the most experiences, of two or more, with two classes or more each; else one for each class."""
    return max((n for n in range(2, num_classes // 2 + 1) if num_classes % n == 0), default=num_classes)


SPEC = ScenarioSpec(
    name="split_classes",
    summary="The classes of any data, a few in each experience.",
    citation=Citation(
        title="Continual Learning Through Synaptic Intelligence",
        authors="Zenke, Poole, Ganguli",
        year=2017,
        arxiv="1703.04200",
    ),
    make=make,
    defaults={"model": {"name": "digits_cnn", "width": 16}},
)
