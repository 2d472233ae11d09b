"""What is said of a client's evaluation, and on which of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fednorm.config.sections import EvaluateConfig
from fednorm.data.domain import Client, Split

Scores = dict[str, float]
"""``num-examples``, mean ``loss`` and ``accuracy`` in [0, 1]; zeros where there are no images."""

Scored = TypeVar("Scored", Scores, Scores | None)


def scores_of(
    clients: Sequence[Client],
    evaluate: EvaluateConfig,
    scored: Callable[[Sequence[Split]], Sequence[Scored]],
    *,
    in_a_round: bool,
) -> list[Scored]:
    """Return each client's scores, in a round those on its images held back too where these choose the best round.

    Args:
        clients: The clients.
        evaluate: What the run says of evaluations.
        scored: Returns the scores on some splits; None for one that it does not score.
        in_a_round: Whether this is a round's evaluation.
    """
    own = list(scored([client.validation if evaluate.split == "validation" else client.test for client in clients]))
    if not (evaluate.best_round and in_a_round):
        return own
    held_back = scored([client.validation for client in clients])
    return [
        scores and of_validation and scores | {f"validation-{key}": value for key, value in of_validation.items()}
        for scores, of_validation in zip(own, held_back, strict=True)
    ]
