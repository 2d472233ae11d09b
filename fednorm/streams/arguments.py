"""What a learner refuses of its arguments and of the labels it is given."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fednorm.errors import ConfigError, DataError

OF_AVALANCHE = frozenset({"plugins", "evaluator", "eval_every", "peval_mode"})
"""Arguments that Avalanche's strategies have and a learner has not."""


def unexpected(name: str, arguments: Iterable[str]) -> Exception:
    """Return the error for arguments that a learner does not have; Avalanche's are its strategy's."""
    named = ", ".join(sorted(arguments))
    if set(arguments) <= OF_AVALANCHE:
        return ConfigError(
            f"{name} is plain PyTorch and has no {named}. Take it as an Avalanche strategy, which has: "
            f"fednorm.avalanche.strategy_of({name}), or for fednorm's own scenarios.learners.er_ace.ERACE and its like."
        )
    return TypeError(f"{name} got unexpected arguments: {named}")


def require_classes(labels: Tensor, num_classes: int, name: str) -> None:
    """Require that labels are classes of the network.

    Args:
        labels: The labels, integers.
        num_classes: K.
        name: What has them, for the error.

    Raises:
        DataError: One is negative, or not below ``num_classes``.
    """
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{name} has labels from {low} to {high}, and the learner has num_classes = {num_classes}: labels 0 to "
            f"{num_classes - 1}. Make the learner, and its network, with as many classes as the stream has."
        )
