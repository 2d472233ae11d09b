"""naive: train on every experience as it comes, and on nothing else.

    loss = cross_entropy(f(x), y)

The lower bound of every comparison of forgetting; on a stream that tests plasticity it is simply training. The same as
Avalanche's ``Naive``, through fednorm's training step.
"""

from __future__ import annotations

from typing import Any

from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.learner import Learner, LearnerSpec


class NaiveLearner(Learner):
    """Trains on the present experience only."""


SPEC = LearnerSpec(
    name="naive",
    summary="Trains on every experience as it comes, and remembers nothing: the lower bound.",
    citation=Citation(
        title="Avalanche: an End-to-End Library for Continual Learning",
        authors="Lomonaco et al.",
        year=2021,
        arxiv="2104.00405",
        where="the strategy Naive",
    ),
    make=NaiveLearner,
    verified=("Avalanche's own Naive, with the same weights in the end.",),
)


def __getattr__(name: str) -> Any:
    """Return ``Naive``: the learner as an Avalanche strategy."""
    return strategies(__name__, Naive=NaiveLearner)(name)
