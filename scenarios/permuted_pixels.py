"""permuted_pixels: the same images in every experience, with their pixels in another order.

Goodfellow, Mirza, Xiao, Courville, Bengio. An Empirical Investigation of Catastrophic Forgetting in Gradient-Based
Neural Networks. 2013. https://arxiv.org/abs/1312.6211 (the Permuted MNIST of later papers). In experience t pixel p of
every image is the original's pixel ``pi_t(p)``, with pi_t a random permutation of the H * W places, the first
experience included and the channels kept together; labels stay.

Pixels are moved when a batch is taken (:class:`fednorm.streams.stream.PermutedSplit`); the array is shared.
"""

from __future__ import annotations

import torch

from fednorm.cards import Citation
from fednorm.data.benchmarks import Reader
from fednorm.options import whole
from fednorm.rng import stream
from fednorm.streams.dealing import Limits, kept_inputs, seed_of_order
from fednorm.streams.spec import ScenarioSpec
from fednorm.streams.stream import Experience, PermutedSplit, Stream


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
        num_experiences: T; how often pixels are permuted. More of them leave the earlier ones as they are.
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
    loaded, kept = kept_inputs("permuted_pixels", reader, seed, limits=limits)
    classes = tuple(range(loaded.num_classes))
    num_pixels = kept.train.images.shape[2] * kept.train.images.shape[3]
    experiences = []
    for number in range(num_experiences):
        order = torch.from_numpy(stream(drawn_from, "stream", "permuted pixels", number).permutation(num_pixels))
        train, validation, test = (
            PermutedSplit(split.images, split.labels, split.index, order, content=split.content)
            for split in (kept.train, kept.validation, kept.test)
        )
        experiences.append(Experience(number, f"pixels {number + 1}", classes, train, validation, test))
    return Stream(
        title=f"{loaded.title} with permuted pixels",
        num_classes=loaded.num_classes,
        image_size=reader.image_size,
        experiences=tuple(experiences),
        class_order=classes,
        notes=loaded.notes,
    )


SPEC = ScenarioSpec(
    name="permuted_pixels",
    summary="The same images in every experience, with their pixels in another random order.",
    citation=Citation(
        title="An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural Networks",
        authors="Goodfellow, Mirza, Xiao, Courville, Bengio",
        year=2013,
        arxiv="1312.6211",
    ),
    make=make,
    defaults={
        "model": {"name": "mlp"},
        "learner": {"name": "naive"},
        "train": {"optimizer": "adam", "learning_rate": 0.001},
    },
)
