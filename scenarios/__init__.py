"""Continual scenarios: one file each, a stream of experiences, and an Avalanche benchmark where one is wanted.

from fednorm.config import DataConfig
from fednorm.avalanche import to_avalanche
from scenarios.split_digits import SPEC
stream = SPEC.stream(DataConfig(), image_size=28, seed=1, options={"num_experiences": 5})
benchmark = to_avalanche(stream)
"""

from __future__ import annotations

FEDNORM_API = 1
"""Tells ``fednorm.cards`` that this is fednorm's package and not a stranger's of the same name."""
