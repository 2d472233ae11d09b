"""Which configuration of a method is reported: rules with names, on scores of images that are not test images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from fednorm.errors import ConfigError

Result = Mapping[str, Any]


def best_by_method(results: Sequence[Result]) -> list[Any]:
    """Return, for each strategy and norm, the results of the configuration with the best mean validation accuracy.

    Options of the norm and of the strategy count as hyper-parameters, the seed does not: a configuration is judged by
    the mean over its seeds, and all of them are returned. Ties go to the first.

    Args:
        results: Results scored on validation images.

    Raises:
        ConfigError: A result was scored on test images: choosing by those would be tuning on test data.
    """
    methods: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        config = result["config"]
        if config["evaluate"]["split"] != "validation":
            raise ConfigError(
                f"Run {result['hash']} was scored on test images, and a configuration is chosen on validation images "
                "only. Run the study with evaluate.split = 'validation' and data.validation > 0."
            )
        method = methods.setdefault((config["strategy"]["name"], config["norm"]["name"]), {})
        method.setdefault(_without_seed(config), []).append(result)
    best = (max(method.values(), key=_score) for method in methods.values())
    return [result for group in best for result in group]


def _without_seed(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key != "seed"}, sort_keys=True)


def _score(seeds: Sequence[Result]) -> float:
    return float(mean(result["final"]["mean"] for result in seeds))
