"""joint: train once on the union of all experiences, drawn i.i.d.: no continual learning at all.

    loss = cross_entropy(f(x), y)

The upper bound of every comparison of forgetting. An epoch is one pass over the union, so as many epochs take about as
many steps as those of :mod:`~scenarios.learners.naive` over the whole stream. Norms are told the experience that each
sample comes from, and that all experiences have been seen. The same as Avalanche's ``JointTraining``, through fednorm's
training step. A stream in which one image has several labels has no union (``Stream.joint``).
"""

from __future__ import annotations

from typing import Any

from fednorm.avalanche import strategies
from fednorm.cards import Citation
from fednorm.streams.learner import Learner, LearnerSpec


class JointLearner(Learner):
    """Trains on the one experience of :func:`~fednorm.avalanche.benchmark.joint_to_avalanche`."""


SPEC = LearnerSpec(
    name="joint",
    summary="Trains once on all experiences together, i.i.d.: the upper bound.",
    citation=Citation(
        title="Avalanche: an End-to-End Library for Continual Learning",
        authors="Lomonaco et al.",
        year=2021,
        arxiv="2104.00405",
        where="the strategy JointTraining",
    ),
    make=JointLearner,
    joint=True,
    verified=("It is naive on the union of all experiences, whose images it is shown to see.",),
)


def __getattr__(name: str) -> Any:
    """Return ``Joint``: the learner as an Avalanche strategy."""
    return strategies(__name__, Joint=JointLearner)(name)
