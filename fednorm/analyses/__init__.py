"""``fednorm analyse``: what papers say that a normalization does to a training, measured on small networks.

One file an analysis; each trains a few networks on one data set, in this process, and measures something that no
accuracy tells. :data:`ANALYSES` has them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fednorm.analyses import effective_rate, linear_probe, massive_activations, norm_only, residual_stream, scaffold
from fednorm.analyses.analysis import Analysis, Setup
from fednorm.errors import unknown_name
from fednorm.threads import torch_threads

__all__ = ["ANALYSES", "Analysis", "Setup", "analyse", "analysis_of"]

ANALYSES: Mapping[str, Analysis] = {
    module.ANALYSIS.name: module.ANALYSIS
    for module in (effective_rate, residual_stream, norm_only, linear_probe, massive_activations, scaffold)
}
"""The analyses by name."""


def analysis_of(name: str) -> Analysis:
    """Return an analysis by its name.

    Raises:
        UnknownNameError: There is none of that name.
    """
    plain = name.strip().lower().replace("-", "_")
    if plain not in ANALYSES:
        raise unknown_name("analysis", name, tuple(ANALYSES))
    return ANALYSES[plain]


def analyse(name: str, setup: Setup, on_line: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Make an analysis.

    Args:
        name: Its name, a key of :data:`ANALYSES`.
        setup: Which data, which seeds, how long.
        on_line: Is told of each row as it is done.

    Returns:
        A document for JSON: ``analysis``, ``data`` (its title), ``notes`` about the data, ``seeds``, ``steps`` and
        ``rows``, each with its ``name`` and ``values``: by column a list, one value a seed.

    Raises:
        FedNormError: The name is unknown, or the data cannot be had.
    """
    analysis = analysis_of(name)
    with torch_threads(1):
        return analysis.run(setup, on_line or (lambda _: None))
