"""The identity card of a continual scenario."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fednorm.config import DataConfig, Scalar
from fednorm.continual.stream import Stream
from fednorm.data.benchmarks import BENCHMARKS, Reader
from fednorm.errors import ConfigError, DataError, canonical, unknown_name
from fednorm.options import flag, number, whole
from fednorm.spec import Citation

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
class ScenarioSpec:
    """What a scenario's file declares.

    Attributes:
        name: The scenario's name, equal to its file's stem.
        summary: One sentence.
        citation: Where it was published.
        make: Builds the stream from a reader of the data and a seed; its keyword arguments are the options.
        data: The benchmarks it can be made of, its own first; empty for any that ``data.name`` names.
        defaults: What the scenario brings along: configuration keys, laid under those the user wrote.
    """

    name: str
    summary: str
    citation: Citation
    make: Callable[..., Stream]
    data: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Return the scenario's options with their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def stream(
        self,
        config: DataConfig,
        *,
        image_size: int,
        seed: int,
        options: Mapping[str, Scalar] | None = None,
        cache_dir: Path | None = None,
    ) -> Stream:
        """Build the scenario's stream for one seed.

        Args:
            config: Which data, and the share ``validation`` held back from each experience's training images.
            image_size: The model's input size in pixels, used where ``config.image_size`` is 0.
            seed: Of the streams ``(seed, "stream", ...)`` that order classes and deal images.
            options: The scenario's options that are not at their default.
            cache_dir: Where decoded arrays are kept.

        Returns:
            The stream; the same for the same arguments.

        Raises:
            UnknownNameError: There is no such benchmark.
            ConfigError: There is no such option, a value is of the wrong type or cannot be, or ``config`` asks for
                something that only clients have.
            DataError: The data is missing, corrupt or unfit.
        """
        given = dict(options or {})
        self._check_options(given)
        name = self._benchmark(config)
        size = config.image_size or image_size
        if size < 1:
            raise DataError(f"The images need a size of at least 1 pixel; got {size}. Set data.image_size.")
        return self.make(Reader(replace(config, name=name), size, cache_dir), seed, **given)

    def _check_options(self, given: Mapping[str, Scalar]) -> None:
        for key, value in given.items():
            if key not in self.options:
                raise ConfigError(
                    f"scenario {self.name} has no option {key!r}. Its options: {', '.join(self.options) or 'none'}."
                )
            default = self.options[key]
            if isinstance(default, bool):
                flag("scenario", key, value)
            elif isinstance(default, int):
                whole("scenario", key, value, at_least=0)
                if key == "num_experiences" and isinstance(value, int) and value > MOST_EXPERIENCES:
                    raise ConfigError(
                        f"scenario.num_experiences is at most {MOST_EXPERIENCES:,} (published streams have a few "
                        f"hundred): each is made before training begins; got {value}."
                    )
            elif isinstance(default, float):
                number("scenario", key, value)

    def _benchmark(self, config: DataConfig) -> str:
        for key in _FEDERATED_ONLY:
            if getattr(config, key) != getattr(DataConfig(), key):
                raise ConfigError(
                    f"data.{key} says what clients hold, and a stream has no clients. Leave it at its default; the "
                    f"options of scenario {self.name} are {', '.join(self.options)}."
                )
        name = canonical(config.name)
        if name not in BENCHMARKS:
            raise unknown_name("benchmark", config.name, BENCHMARKS)
        if not self.data or name in self.data:
            return name
        if name != DataConfig().name:
            raise ConfigError(
                f"scenario {self.name} is made of {' or '.join(self.data)}; data.name is {name!r}. Leave data.name "
                "out, or take a scenario of any data: split, permuted_labels, permuted_pixels, random_labels."
            )
        return self.data[0]
