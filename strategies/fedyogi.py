"""FedYogi: FedAdam whose second moment moves by a bounded amount.

Reddi et al. Adaptive Federated Optimization. ICLR 2021. https://arxiv.org/abs/2003.00295, Algorithm 2

    v <- v - (1 - beta_2) d^2 sign(v - d^2)

All else is :mod:`strategies.fedadam`, also in acting on the learned tensors only.
"""

from __future__ import annotations

from torch import Tensor

from fednorm.federation.spec import StrategySpec
from strategies.fedadam import CITATION, FedAdam


class FedYogi(FedAdam):
    """Averages every tensor, and moves the learned ones by Yogi's rule; arguments as for FedAdam."""

    def second_moment(self, second: Tensor, delta: Tensor) -> Tensor:
        """Return the next second moment."""
        square = delta**2
        return second - (1 - self.beta_2) * square * (second - square).sign()


SPEC = StrategySpec(
    name="fedyogi",
    summary="An adaptive (Yogi) server optimizer over the learned tensors only.",
    citation=CITATION,
    make=FedYogi,
    verified=(
        "Five rounds against the published formula in float64.",
        "Flower's own FedYogi, once its two differences are undone.",
    ),
)
