"""Domain-incremental streams: the classes stay, and one domain comes after another."""

from __future__ import annotations

from collections.abc import Callable

from fednorm.data.benchmarks import Reader
from fednorm.errors import ConfigError
from fednorm.options import one_of
from fednorm.rng import stream
from fednorm.streams.dealing import Limits, deal, load, seed_of_order
from fednorm.streams.stream import Experience, Stream


def domains(scenario: str, usual: str = "shuffled") -> Callable[..., Stream]:
    """Return what builds a scenario of the domains of a benchmark.

    Args:
        scenario: The scenario's name.
        usual: The default of ``domain_order``.
    """

    def make(
        reader: Reader,
        seed: int,
        *,
        domain_order: str = usual,
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
                f"scenario {scenario} needs two domains or more; {loaded.title} has {count}. Name more in "
                "data.domains, or leave it out for all there are."
            )
        shuffled = domain_order == "shuffled"
        order = stream(drawn_from, "stream", "domain order").permutation(count) if shuffled else range(count)
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

    return make
