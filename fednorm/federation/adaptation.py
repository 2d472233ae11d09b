"""Test-time adaptation of a federation's finished network: what its clients score with it, and without.

Adapted are the clients of the domain that was held out of training, where there is one; else all that are evaluated,
each with its own tensors where the strategy keeps some on clients. What a method must learn before (ATP's rates), the
training clients learn, round by round, from the network that will be adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fednorm.adaptation import Adaptation
from fednorm.adaptation._scoring import averaged, described, made_adaptations
from fednorm.config import EvaluateConfig
from fednorm.federation.client_adaptation import ADAPTATION, LEARNING
from fednorm.federation.matrix import Base, EvaluationMatrix

HELD_OUT, CLIENTS = "held-out clients", "clients"


def adapted(matrix: EvaluationMatrix, *, config: EvaluateConfig, model: nn.Module) -> dict[str, Any]:
    """Return the scores of each adaptation beside those without any; nothing where none was asked for.

    Args:
        matrix: The way to the clients.
        config: Which adaptations.
        model: The run's architecture, with any values.

    Returns:
        ``of`` whom, scores ``without``, and ``methods``: what each is, its scores, and the ``change`` of the mean.

    Raises:
        IncompleteError: Too few clients answered.
    """
    methods = made_adaptations(config)
    if not methods:
        return {}
    unseen = matrix.held_out
    nodes, base = (unseen, matrix.base_of_unseen()) if unseen else (matrix.seen(), matrix.base_of_own)
    without = matrix.adapted("adaptation: none", nodes, base, None, {})
    learned: dict[Adaptation, Mapping[str, Tensor]] = {}
    rows = []
    for number, (how, table) in enumerate(zip(methods, config.adaptation, strict=True)):
        kind = f"adaptation {table['name']}"
        alike = replace(how, order="shuffled", reset="each")  # what has no part in learning
        if alike not in learned:
            learned[alike] = _learned(matrix, kind, base, number, how, model)
        scores = matrix.adapted(kind, nodes, base, number, learned[alike])
        scored = scores["mean"] is not None and without["mean"] is not None  # else nobody has images
        change = scores["mean"] - without["mean"] if scored else None
        rows.append({**described(how, table["name"]), **scores, "change": change})
    about = {"of": HELD_OUT if unseen else CLIENTS, **({"with": base.fallback} if base.fallback else {})}
    return {**about, "without": without, "methods": rows}


def _learned(
    matrix: EvaluationMatrix, kind: str, base: Base, number: int, how: Adaptation, model: nn.Module
) -> Mapping[str, Tensor]:
    if not how.rounds_of_learning:
        return {}
    knowledge = {key: tensor.cpu() for key, tensor in how.initial(model).items()}
    for round_of_learning in range(how.rounds_of_learning):
        numbers = {ADAPTATION: number, LEARNING: round_of_learning}
        knowledge = averaged(matrix.refined(kind, base, numbers, knowledge))
    return knowledge
