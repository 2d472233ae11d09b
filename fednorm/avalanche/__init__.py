"""fednorm's norms in Avalanche's own strategies.

strategy = SCR(model=fednorm.convert(model, "adab2n"), ..., plugins=[NormPlugin()])
for experience in benchmark.train_stream:
    strategy.train(experience)
"""

from __future__ import annotations

from fednorm.avalanche.plugin import NormPlugin

__all__ = ["NormPlugin"]
