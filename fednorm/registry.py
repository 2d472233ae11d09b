"""Older names of what :mod:`fednorm.cards` and :mod:`fednorm.config` have."""

from __future__ import annotations

from fednorm.cards import LEARNERS, SCENARIOS, STRATEGIES
from fednorm.config import resolve

resolve_config = resolve_continual = resolve
strategy_spec, scenario_spec, learner_spec = STRATEGIES.__getitem__, SCENARIOS.__getitem__, LEARNERS.__getitem__
