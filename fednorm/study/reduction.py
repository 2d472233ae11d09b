"""A smaller study of the same shape: fewer rounds, images and clients, as many methods and seeds, the same networks.

    fednorm compare digits --reduce 0.1 --data-dir DIR

Each number of :data:`SCALED` is multiplied by the factor and rounded, no lower than its floor, below which a study says
nothing, and no higher than it was. Keys that the study's grid or search varies stay: they are what it is about. What a
reduced study's tables, page and records say is said to be reduced (:mod:`fednorm.study.manifest`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fednorm.config import KeyPath, RunConfig, flatten, merge, nest
from fednorm.errors import ConfigError

ALL_IMAGES = 5000
"""What a limit on images of 0, which is all of them, counts as."""

SCALED: Mapping[KeyPath, int] = {
    ("rounds", "num_rounds"): 2,
    ("rounds", "evaluate_every"): 1,
    ("data", "clients_per_domain"): 2,
    ("data", "train_per_client"): 32,
    ("data", "test_per_domain"): 50,
    ("train", "epochs"): 1,
    ("grid", "clients"): 2,
    ("train", "decay_every"): 1,
    ("scenario", "train_per_experience"): 50,
    ("scenario", "test_per_experience"): 50,
    ("learner", "memory_size"): 20,
}
"""The keys that are multiplied, and their floors."""

CAPS = frozenset(path for path in SCALED if path[1].startswith(("train_per", "test_per")))
"""Limits on images, of which 0 is none."""

EXPERIENCES = ("scenario", "num_experiences")
FEWEST_EXPERIENCES = 4
"""Of a memorization stream, whose experiences are many of a kind; other streams keep theirs, which divide classes."""

BELOW_ROUNDS = (("train", "linear_probe_rounds"), ("train", "warmup_steps"))
"""Of a federation: lengths in rounds, which are scaled and stay below their number."""


def require_factor(factor: float) -> float:
    """Return a factor by which a study can be made smaller.

    Raises:
        ConfigError: It is not between 0 and 1.
    """
    if not 0 < factor < 1:
        raise ConfigError(
            f"--reduce is a factor between 0 and 1, e.g. 0.1 for a tenth of the rounds, images and clients; got "
            f"{factor:g}. Leave it out for the whole study."
        )
    return factor


def reduction(config: RunConfig, factor: float, kept: Collection[KeyPath] = ()) -> dict[str, Any]:
    """Return the keys of a run that a reduced study has otherwise, nested.

    Args:
        config: The run as the study has it.
        factor: In (0, 1).
        kept: Keys that stay.
    """
    own = flatten(merge(config.to_dict(), _options(config)))
    less: dict[KeyPath, Any] = {}
    for path, floor in SCALED.items():
        of_clients = path[0] == "data"  # a stream's images are its scenario's
        if path in own and path not in kept and not (of_clients and config.kind != "federated"):
            less[path] = _scaled(own[path], factor, floor, capped=path in CAPS)
    alike = config.kind != "federated" and config.scenario.card.memorization
    if alike and EXPERIENCES in own and EXPERIENCES not in kept:
        less[EXPERIENCES] = _scaled(own[EXPERIENCES], factor, FEWEST_EXPERIENCES, capped=False)
    if config.kind == "federated":
        rounds = less.get(("rounds", "num_rounds"), config.rounds.num_rounds)
        for path in BELOW_ROUNDS:
            if path not in kept:
                less[path] = min(round(own[path] * factor), rounds - 1)
    return nest({path: value for path, value in less.items() if value != own[path]})


def _scaled(value: int, factor: float, floor: int, *, capped: bool) -> int:
    if capped and not value:
        return max(floor, round(ALL_IMAGES * factor))
    return min(value, max(floor, round(value * factor)))


def _options(config: RunConfig) -> dict[str, Any]:
    """Return the options of scenario and learner, those at their default too."""
    return {} if config.kind == "federated" else {"scenario": config.scenario.values, "learner": config.learner.values}


def departures(own: RunConfig, original: RunConfig, immaterial: Collection[KeyPath]) -> dict[str, list[Any]]:
    """Return the keys in which a run departs from what its study's file says: its value, and the study's.

    Args:
        own: The run.
        original: The same run with nothing set, and nothing reduced.
        immaterial: Keys that are not compared.
    """
    left, right = (flatten(merge(config.to_dict(), _options(config))) for config in (own, original))
    return {
        ".".join(path): [left.get(path), right.get(path)]
        for path in dict.fromkeys((*left, *right))
        if path not in immaterial and left.get(path) != right.get(path)
    }
