"""Which configuration of a method is reported: rules with names, on scores of images that are not test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fednorm.errors import ConfigError

Result = Mapping[str, Any]


def best_by_method(results: Sequence[Result]) -> list[Any]:
    """Return, for each strategy and norm, the result with the best mean validation accuracy.

    Options of the norm and of the strategy count as hyper-parameters; ties go to the first.

    Args:
        results: Results scored on validation images.

    Raises:
        ConfigError: A result was scored on test images: choosing by those would be tuning on test data.
    """
    best: dict[tuple[str, str], Result] = {}
    for result in results:
        config = result["config"]
        if config["evaluate"]["split"] != "validation":
            raise ConfigError(
                f"Run {result['hash']} was scored on test images, and a configuration is chosen on validation images "
                "only. Run the study with evaluate.split = 'validation' and data.validation > 0."
            )
        key = (config["strategy"]["name"], config["norm"]["name"])
        if key not in best or result["final"]["mean"] > best[key]["final"]["mean"]:
            best[key] = result
    return list(best.values())
