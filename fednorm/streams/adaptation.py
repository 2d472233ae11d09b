"""Test-time adaptation of a stream's finished network: what it scores with it on every experience, and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from fednorm.adaptation import Adaptation
from fednorm.adaptation._scoring import Adapted, averaged, described, made_adaptations, refined
from fednorm.config import RunConfig
from fednorm.data.domain import Split
from fednorm.streams.evaluation import accuracy, split_of
from fednorm.streams.stream import Experience

OF = "experiences"


def adapted(model: nn.Module, config: RunConfig, experiences: Sequence[Experience]) -> dict[str, Any]:
    """Return the scores of each adaptation beside those without any.

    Args:
        model: The finished network, in evaluation mode; it stays as it is.
        config: The run's configuration.
        experiences: Those that are scored, in the order in which their images come.

    Returns:
        ``of`` what, scores ``without``, and ``methods``: what each is, its scores, and the ``change`` of the mean.
        Scores are the accuracies ``per_experience`` and their ``mean``.
    """
    evaluate, seed = config.evaluate, config.seed
    splits = [split_of(experience, evaluate.split) for experience in experiences]
    plain = [
        accuracy(model, split, experience.classes, batch_size=evaluate.batch_size).overall
        for split, experience in zip(splits, experiences, strict=True)
    ]
    without = _scores(experiences, plain)
    learned: dict[Adaptation, Mapping[str, Tensor]] = {}
    rows = []
    for how, table in zip(made_adaptations(evaluate), evaluate.adaptation, strict=True):
        alike = replace(how, order="shuffled", reset="each")  # what has no part in learning
        if alike not in learned:
            learned[alike] = _learned(how, model, experiences, seed)
        network = Adapted(how, model, learned[alike])
        shares = [
            network.accuracy(split, seed, "experience", experience.number)
            for split, experience in zip(splits, experiences, strict=True)
        ]
        scores = _scores(experiences, shares)
        rows.append({**described(how, table["name"]), **scores, "change": scores["mean"] - without["mean"]})
    return {"of": OF, "without": without, "methods": rows}


def _scores(experiences: Sequence[Experience], shares: Sequence[float]) -> dict[str, Any]:
    numbers = [str(experience.number + 1) for experience in experiences]
    return {"per_experience": dict(zip(numbers, shares, strict=True)), "mean": fmean(shares)}


def _learned(how: Adaptation, model: nn.Module, experiences: Sequence[Experience], seed: int) -> Mapping[str, Tensor]:
    """Return what a method learns before it adapts anything; each experience stands in for a training client."""
    if not how.rounds_of_learning:
        return {}
    knowledge = how.initial(model)
    for number in range(how.rounds_of_learning):
        learned = [
            refined(how, model, knowledge, _known(experience), seed, "experience", experience.number, number)
            for experience in experiences
        ]
        knowledge = averaged(learned)
    return knowledge


def _known(experience: Experience) -> Split:
    return experience.validation if len(experience.validation) else experience.train
