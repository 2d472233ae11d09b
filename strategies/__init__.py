"""Federated strategies: one file each, each a Flower ``Strategy`` that any Flower project can import.

from strategies.fedbn import FedBN
strategy = FedBN(model, fraction=0.5, seed=1)
strategy.start(grid, strategy.initial_arrays(model), num_rounds=10)

What a strategy adds to its clients' training is in the same file, a :class:`~fednorm.federation.local.Local`.
"""

from __future__ import annotations

FEDNORM_API = 1
"""Tells ``fednorm.cards`` that this is fednorm's package and not a stranger's of the same name."""
