"""random_labels: the same images in every experience, with labels drawn anew.

The continual memorization of Lyle, Zheng, Khetarpal, Martens, van Hasselt, Pascanu, Dabney. Normalization and effective
learning rates in reinforcement learning. NeurIPS 2024. https://arxiv.org/abs/2407.01800 (section 5, figure 5; there
CIFAR-10, 200 experiences of 100,000 steps). Every image of an experience gets an independent uniform label, which has
nothing to do with what it shows: all that can be learned is the list. It measures plasticity, the accuracy reached on
the *training* images of each experience, and not forgetting.

There is therefore nothing to hold out: the test images of an experience are its training images
(``Stream.memorization``), and validation is refused. The data set's own test images are not used.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fednorm.cards import Citation
from fednorm.data.benchmarks import Reader
from fednorm.errors import ConfigError
from fednorm.options import whole
from fednorm.rng import stream
from fednorm.streams.dealing import Limits, kept_inputs, seed_of_order
from fednorm.streams.spec import ScenarioSpec
from fednorm.streams.stream import Experience, Stream


def make(
    reader: Reader,
    seed: int,
    *,
    num_experiences: int = 10,
    order_seed: int | str = "run",
    train_per_experience: int = 0,
) -> Stream:
    """Build the stream.

    Args:
        reader: Reads the data.
        seed: The run's seed.
        num_experiences: T; how often labels are drawn. More of them leave the earlier ones as they are.
        order_seed: Of the labels: ``run`` for the run's seed, or a number.
        train_per_experience: Most images; 0 for all.

    Raises:
        ConfigError: The number of experiences is none, or validation images are asked for.
        DataError: The data is missing or corrupt, or several data sets.
    """
    whole("scenario", "num_experiences", num_experiences, at_least=1)
    drawn_from = seed_of_order(seed, order_seed)
    if reader.config.validation:
        raise ConfigError(
            f"scenario random_labels has no validation images: random labels cannot be predicted, only memorised. Set "
            f"data.validation to 0 (now {reader.config.validation:g}) and choose by training accuracy."
        )
    loaded, kept = kept_inputs("random_labels", reader, seed, limits=Limits(train=train_per_experience))
    classes = tuple(range(loaded.num_classes))
    experiences = []
    for number in range(num_experiences):
        drawn = stream(drawn_from, "stream", "random labels", number).integers(0, loaded.num_classes, len(kept.train))
        labels = torch.zeros_like(kept.train.labels)
        labels[kept.train.index] = torch.from_numpy(drawn)
        images = replace(kept.train, labels=labels)
        none = replace(images, index=images.index[:0])
        experiences.append(Experience(number, f"labels {number + 1}", classes, images, none, images))
    note = "Random labels, drawn anew in every experience: accuracies are those of memorised training images."
    return Stream(
        title=f"{loaded.title} with random labels",
        num_classes=loaded.num_classes,
        image_size=reader.image_size,
        experiences=tuple(experiences),
        class_order=classes,
        memorization=True,
        notes=(*loaded.notes, note),
    )


SPEC = ScenarioSpec(
    memorization=True,
    name="random_labels",
    summary="The same images in every experience, with labels drawn anew: memorization, a test of plasticity.",
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
