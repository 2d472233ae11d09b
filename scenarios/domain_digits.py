"""domain_digits: all ten digits in every experience, one domain after another.

The domain-incremental setting of van de Ven, Tolias. Three scenarios for continual learning. 2019.
https://arxiv.org/abs/1904.07734: the classes stay, the inputs' distribution changes, and the task is not told. The
domains are those of ``digits_mini`` (embedded) or ``digits`` (real data), of the other benchmarks with several domains,
or of data of your own.

A domain's images are all in one experience, and none of them in another; ``mnistm`` is made from ``mnist``'s digits,
though, which the stream's notes say where it matters.
"""

from __future__ import annotations

from fednorm.cards import Citation
from fednorm.data.benchmarks import Reader
from fednorm.errors import ConfigError
from fednorm.options import one_of
from fednorm.rng import stream
from fednorm.streams.dealing import Limits, deal, load, seed_of_order
from fednorm.streams.spec import ScenarioSpec
from fednorm.streams.stream import Experience, Stream


def make(
    reader: Reader,
    seed: int,
    *,
    domain_order: str = "shuffled",
    order_seed: int | str = "run",
    train_per_experience: int = 0,
    test_per_experience: int = 0,
) -> Stream:
    """Build the stream; it has as many experiences as there are domains (``data.domains``).

    Args:
        reader: Reads the data.
        seed: The run's seed.
        domain_order: ``shuffled`` by the seed, or ``given``: as in ``data.domains`` or the benchmark.
        order_seed: Of the domains' order: ``run`` for the run's seed, or a number.
        train_per_experience: Most training images an experience; 0 for all.
        test_per_experience: Most test images an experience; 0 for all.

    Raises:
        ConfigError: There is one domain only, or the order is something else.
        DataError: The data is missing or corrupt.
    """
    one_of("scenario", "domain_order", domain_order, ("shuffled", "given"))
    drawn_from = seed_of_order(seed, order_seed, drawn=domain_order != "given")
    loaded = load(reader)
    count = len(loaded.domains)
    if count < 2:
        raise ConfigError(
            f"scenario domain_digits needs two domains or more; {loaded.title} has {count}. Name more in data.domains, "
            "or leave it out for all there are."
        )
    order = range(count) if domain_order == "given" else stream(drawn_from, "stream", "domain order").permutation(count)
    limits = Limits(reader.config.validation, train_per_experience, test_per_experience)
    classes = tuple(range(loaded.num_classes))
    experiences = []
    for number, which in enumerate(order):
        domain = loaded.domains[which]
        portion = deal(domain, limits, seed, domain.name)
        splits = portion.train, portion.validation, portion.test
        experiences.append(Experience(number, domain.name, classes, *splits, domain=domain.name))
    notes = list(loaded.notes)
    if {"mnist", "mnistm"} <= {domain.name for domain in loaded.domains}:
        notes.append(
            "mnistm is made from MNIST's digits, train from train and test from test: not independent domains."
        )
    return Stream(
        title=f"domains of {loaded.title}, one after another",
        num_classes=loaded.num_classes,
        image_size=reader.image_size,
        experiences=tuple(experiences),
        class_order=classes,
        notes=tuple(notes),
    )


SPEC = ScenarioSpec(
    name="domain_digits",
    summary="All ten digits in every experience, one domain after another.",
    citation=Citation(
        title="Three scenarios for continual learning",
        authors="van de Ven, Tolias",
        year=2019,
        arxiv="1904.07734",
    ),
    make=make,
    data=("digits_mini", "digits", "office_caltech10", "pacs", "folders", "image_folders"),
    defaults={"model": {"name": "digits_cnn", "width": 16}},
)
