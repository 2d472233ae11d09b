"""Continual scenarios: streams of experiences for Avalanche. None has landed yet."""

from __future__ import annotations

FEDNORM_API = 1
"""Tells ``fednorm.registry`` that this is fednorm's package and not a stranger's of the same name."""

SCENARIOS: tuple[str, ...] = ()
"""The names of the scenarios."""
