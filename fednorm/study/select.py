"""Which configuration of a method is reported: rules with names, on scores of images that are not test images."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from statistics import mean
from typing import Any

from fednorm.config import IMMATERIAL, MACHINE, RunConfig
from fednorm.errors import ConfigError
from fednorm.records.result import result_of

Result = Mapping[str, Any]


def best_by_method(results: Sequence[Result]) -> list[Any]:
    """Return, for each method, the results of the configuration with the best mean score; ties go to the first.

    The seed is no hyper-parameter: a configuration is judged by the mean over its seeds, and all of them are returned.

    *Federated*: a method is a strategy and a norm, their options are tuned, and the score is the mean validation
    accuracy over domains. *Continual*: a method is a learner, a norm, :data:`~fednorm.config.METHOD_OPTIONS` and
    :data:`~fednorm.config.METHOD_SWITCHES`, chosen for each stream; the score is the average accuracy on validation
    images after the last experience. A memorization stream has nothing to hold out: there the score is plasticity, the
    accuracy on training images, which is what the stream is about (:func:`rules` says so).

    Args:
        results: Results scored on validation images.

    Raises:
        ConfigError: A result was scored on test images: choosing by those would be tuning on test data. Or a stream's
            average accuracy was not measured.
    """
    methods: dict[Hashable, dict[str, list[Result]]] = {}
    for result in results:
        _require_held_out(result)
        configurations = methods.setdefault(_method(result), {})
        configurations.setdefault(_without_seed(result["config"]), []).append(result)
    best = (max(configurations.values(), key=mean_score) for configurations in methods.values())
    return [result for group in best for result in group]


def best_of(configurations: Sequence[Sequence[Result]]) -> int:
    """Return the number of the configuration with the best mean score over its seeds; ties go to the first.

    What the results were scored on is the caller's to answer for: :func:`best_by_method` refuses test images.

    Args:
        configurations: The results of each configuration, one a seed.

    Raises:
        ConfigError: A score was not measured.
    """
    scores = [mean_score(results) for results in configurations]
    return scores.index(max(scores))


def rules(results: Sequence[Result]) -> list[str]:
    """Return by what :func:`best_by_method` chooses among these results, a sentence each."""
    return list(dict.fromkeys(rule(result_of(result).subject, on_test=False) for result in results))


def rule(kind: str, *, on_test: bool) -> str:
    """Return the sentence that says by what a configuration is chosen.

    Args:
        kind: ``federated``, ``continual`` or ``memorization``.
        on_test: Whether test images are scored instead of validation images.
    """
    images = "test" if on_test else "validation"
    said = {
        "federated": f"Chosen by the mean {images} accuracy over domains",
        "continual": f"Chosen by the average accuracy on {images} images after the last experience",
        "federated_continual": f"Chosen by the mean accuracy of clients on {images} images after the last experience",
        "memorization": "Chosen by plasticity, the training accuracy in the last tenth of the experiences: "
        "a memorization stream has no images to hold out",
    }
    favours = on_test and kind != "memorization"
    return said[kind] + (" (--select-on-test): the test numbers flatter every method." if favours else ".")


def kind_of(config: RunConfig) -> str:
    """Return the kind of run as the rules of selection tell them apart, before it has been run.

    Returns:
        The run's kind, or ``memorization``.
    """
    return "memorization" if config.kind == "continual" and config.scenario.card.memorization else config.kind


def _require_held_out(result: Result) -> None:
    if not result_of(result).memorizes and result["config"]["evaluate"]["split"] != "validation":
        raise ConfigError(
            f"Run {result['hash']} was scored on test images, and a configuration is chosen on validation images "
            "only. Run the study with evaluate.split = 'validation' and data.validation > 0."
        )


def _method(result: Result) -> Hashable:
    """Return what makes a result's method; results with equal ones are configurations of it."""
    config = result["config"]
    machine = tuple(f"{key} {config[key]}" for key in MACHINE if config.get(key, MACHINE[key]) != MACHINE[key])
    return *result_of(result).method, machine


def _without_seed(config: Mapping[str, Any]) -> str:
    """Return a configuration as text, without the seed and what leaves the numbers alone."""
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    plain.pop("seed")
    for section, key in IMMATERIAL:
        plain.get(section, {}).pop(key, None)
    return json.dumps(plain, sort_keys=True)


def mean_score(results: Sequence[Result]) -> float:
    """Return the mean over seeds of what a configuration is chosen by, in [0, 1].

    Raises:
        ConfigError: The score was not measured.
    """
    return float(mean(map(_score, results)))


def _score(result: Result) -> float:
    score = result["final"][result_of(result).headline]
    if score is None:
        raise ConfigError(
            f"Run {result['hash']} has no average accuracy to be chosen by: evaluate.experiences is "
            f"{result['config']['evaluate']['experiences']!r}. Run the study with 'all' or 'seen'."
        )
    return float(score)
