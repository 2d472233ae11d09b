"""The identity card of a continual scenario."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from fednorm.cards import DATA, SCENARIOS, Card, spelled
from fednorm.config import DataConfig, Scalar, checked_options
from fednorm.data.benchmarks import Reader
from fednorm.errors import ConfigError, DataError
from fednorm.options import whole
from fednorm.streams.stream import Stream

MOST_EXPERIENCES = 10_000
"""Of a stream."""

_FEDERATED_ONLY = (
    "train_per_client",
    "test_per_domain",
    "clients_per_domain",
    "partition",
    "alpha",
    "shards_per_client",
    "held_out",
    "merge",
)


@dataclass(frozen=True, kw_only=True)
class ScenarioSpec(Card):
    """What a scenario's file declares.

    Attributes:
        make: Builds the stream from a reader of the data and a seed; its keyword arguments are the options.
        data: The benchmarks it can be made of, its own first; empty for any that ``data.name`` names.
        defaults: What the scenario brings along: configuration keys, laid under those the user wrote.
        memorization: Whether its streams are about memorization: they hold no images out.
    """

    make: Callable[..., Stream]
    data: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    memorization: bool = False

    expects: ClassVar[str] = (
        "A scenario is a callable (reader, seed, *, options) -> Stream, or a ScenarioSpec beside it."
    )

    @classmethod
    def adopt(cls, method: Any, reference: str) -> Self | None:
        """Return a card for a callable that builds a stream from a reader and a seed."""
        if not callable(method) or len(inspect.signature(method).parameters) < 2:
            return None
        return cls(name=reference, summary=(method.__doc__ or "").strip().partition("\n")[0], make=method)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse numbers that no stream has: every experience is made before training begins."""
        for key, value in options.items():
            if self.declared[key].type is int:
                whole("scenario", key, value, at_least=0)
        if options.get("num_experiences", 0) > MOST_EXPERIENCES:
            raise ConfigError(
                f"scenario.num_experiences is at most {MOST_EXPERIENCES:,} (published streams have a few hundred): all "
                f"are made before training begins; got {options['num_experiences']}."
            )

    @property
    def maker(self) -> Callable[..., Stream]:
        """What builds the stream."""
        return self.make

    def stream(
        self,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        options: Mapping[str, Scalar] | None = None,
        cache_dir: Path | None = None,
        reader: type[Reader] = Reader,
    ) -> Stream:
        """Build the scenario's stream for one seed.

        Args:
            config: Which data, and the share ``validation`` held back from each experience's training images.
            image_size: The model's input size in pixels, used where ``config.image_size`` is 0.
            seed: Of the streams ``(seed, "stream", ...)`` that order classes and deal images, where
                ``config.split_seed`` is 0.
            options: The scenario's options that are not at their default.
            cache_dir: Where decoded arrays are kept.
            reader: What reads the data sets.

        Returns:
            The stream; the same for the same arguments.

        Raises:
            UnknownNameError: There is no such benchmark.
            ConfigError: There is no such option, a value is of the wrong type or cannot be, or ``config`` asks for
                something that only clients have.
            DataError: The data is missing, corrupt or unfit.
        """
        given = checked_options(self, "scenario", options or {})
        self.check(given)
        name = self._benchmark(config)
        size = config.image_size or image_size
        if size < 1:
            raise DataError(f"The images need a size of at least 1 pixel; got {size}. Set data.image_size.")
        return self.make(reader(config.replace(name=name), size, cache_dir), config.split_seed or seed, **given)

    def _benchmark(self, config: DataConfig) -> str:
        for key in _FEDERATED_ONLY:
            if getattr(config, key) != getattr(DataConfig(), key):
                raise ConfigError(
                    f"data.{key} says what clients hold, and a stream has no clients. Leave it at its default; the "
                    f"options of scenario {self.name} are {', '.join(self.options)}."
                )
        name, card = spelled(config.name), DATA[config.name]
        # Where a scenario leaves a choice, it takes what anybody brings; one that is named for its data does not.
        if not self.data or name in self.data or (len(self.data) > 1 and not card.ships):
            return name
        if name != DataConfig().name:
            free = ", ".join(spec.name for spec in SCENARIOS if not spec.data)
            hint = f"Leave data.name out, or take a scenario of any data: {free}."
            raise ConfigError(
                f"scenario {self.name} is made of {' or '.join(self.data)}; data.name is {name!r}. {hint}"
            )
        return self.data[0]
