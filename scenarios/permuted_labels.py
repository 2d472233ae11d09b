"""permuted_labels: the same images in every experience, with the classes renamed anew.

The label permutation of Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney. Normalization and effective
learning rates in reinforcement learning. NeurIPS 2024. https://arxiv.org/abs/2407.01800. In experience t a label k
becomes ``pi_t(k)``, with pi_t a random permutation of the K classes, the first experience included; training and test
images are renamed alike, so that generalisation can be measured. The features stay useful and only the last layer need
change.
"""

from __future__ import annotations

import torch

from fednorm.cards import Citation
from fednorm.data.benchmarks import Reader
from fednorm.options import whole
from fednorm.rng import stream
from fednorm.streams.dealing import Limits, kept_inputs, relabelled, seed_of_order
from fednorm.streams.spec import ScenarioSpec
from fednorm.streams.stream import Experience, Stream


def make(
    reader: Reader,
    seed: int,
    *,
    num_experiences: int = 10,
    order_seed: int | str = "run",
    train_per_experience: int = 0,
    test_per_experience: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T; how often classes are renamed. More of them leave the earlier ones as they are.
        order_seed: Of the permutations: ``run`` for the run's seed, or a number.
        train_per_experience: Most training images; 0 for all.
        test_per_experience: Most test images; 0 for all.

    Raises:
        ConfigError: The number of experiences is none.
        DataError: The data is missing or corrupt, or several data sets.
    """
    whole("scenario", "num_experiences", num_experiences, at_least=1)
    drawn_from = seed_of_order(seed, order_seed)
    limits = Limits(reader.config.validation, train_per_experience, test_per_experience)
    loaded, kept = kept_inputs("permuted_labels", reader, seed, limits=limits)
    classes = tuple(range(loaded.num_classes))
    # Rows of the array that no split has may have any label: clamped, so that they can be looked up at all.
    labels = kept.train.labels.clamp(0, loaded.num_classes - 1)
    experiences = []
    for number in range(num_experiences):
        drawn = stream(drawn_from, "stream", "permuted labels", number).permutation(loaded.num_classes)
        portion = relabelled(kept, torch.from_numpy(drawn)[labels])
        title = f"labels {number + 1}"
        experiences.append(Experience(number, title, classes, portion.train, portion.validation, portion.test))
    return Stream(
        title=f"{loaded.title} with permuted labels",
        num_classes=loaded.num_classes,
        image_size=reader.image_size,
        experiences=tuple(experiences),
        class_order=classes,
        notes=loaded.notes,
    )


SPEC = ScenarioSpec(
    name="permuted_labels",
    summary="The same images in every experience, with the classes renamed by a random permutation.",
    citation=Citation(
        title="Normalization and effective learning rates in reinforcement learning",
        authors="Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney",
        year=2024,
        arxiv="2407.01800",
    ),
    make=make,
    defaults={
        "model": {"name": "mlp"},
        "learner": {"name": "naive"},
        "train": {"optimizer": "adam", "learning_rate": 0.001},
    },
)
