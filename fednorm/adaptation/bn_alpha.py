"""bn_alpha: batch normalization under a mixture of its running statistics and those of the test batch.

    mean = (1 - a) M + a m        var = (1 - a) V + a v        a = alpha,  or  n / (N + n)

M, V are the running mean and variance; m, v are the mean and variance of the test batch at that layer, of all its
values of a channel, those of earlier layers being mixed already. With ``prior`` N > 0 the weight follows the batch:
the running statistics count as those of N images, the batch has n. a = 0 is plain evaluation, to the bit; a = 1 is
"BN-1", the statistics of the test batch alone. Nothing is carried from one batch to the next, and no label or
gradient is used: a batch is predicted under its own mixture.

Schneider, Rusak, Eck, Bringmann, Brendel, Bethge. Improving Robustness against Common Corruptions by Covariate Shift
Adaptation. NeurIPS 2020. https://arxiv.org/abs/2006.16971; Nado et al., arXiv 2006.10963, for a = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fednorm.adaptation import Adaptation, AdaptationSpec, Adapter, Knowledge
from fednorm.adaptation._layers import (
    moments,
    normalized,
    replace_forward,
    require_statistics,
    running,
    statistics_layers,
)
from fednorm.cards import Citation
from fednorm.errors import ConfigError
from fednorm.options import share, whole


@dataclass(frozen=True, kw_only=True)
class BNAlpha(Adaptation):
    """Mixes running and batch statistics.

    Attributes:
        alpha: Weight of the batch's statistics, 0 to 1.
        prior: N, the images that the running statistics count as; above 0 the weight is n / (N + n) for a batch of n
            images, in place of ``alpha``.
    """

    method: ClassVar[str] = "bn_alpha"

    alpha: float = 0.1
    prior: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self.method, "alpha", self.alpha)
        whole(self.method, "prior", self.prior, at_least=0)
        if self.prior and self.alpha != type(self).alpha:
            raise ConfigError(
                f"bn_alpha.prior = {self.prior} makes the weight n / ({self.prior} + n), and bn_alpha.alpha = "
                f"{self.alpha:g} is another one. Leave one of the two out."
            )

    def weight(self, images: int) -> float:
        """Return the weight of the statistics of a batch of so many images."""
        return images / (self.prior + images) if self.prior else self.alpha

    def check(self, model: nn.Module) -> None:
        """Refuse a network without running statistics."""
        require_statistics(model, self.method)

    def begin(self, model: nn.Module, knowledge: Knowledge) -> Adapter:
        """Return what predicts each batch under its own mixture."""
        del knowledge
        count = 0

        def mixed(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
            plain = layer.forward

            def forward(x: Tensor) -> Tensor:
                share = self.weight(count)
                if not share:
                    return plain(x)
                mean, var = (own.lerp(new, share) for own, new in zip(running(layer), moments(x), strict=True))
                return normalized(layer, x, mean, var)

            return forward

        for layer in statistics_layers(model, self.method).values():
            replace_forward(layer, mixed(layer))

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            nonlocal count
            count = len(images)
            logits: Tensor = model(images)
            return logits

        return predict


SPEC = AdaptationSpec(
    name="bn_alpha",
    summary="Batch normalization under a mixture of its running statistics and those of the test batch.",
    citation=Citation(
        title="Improving Robustness against Common Corruptions by Covariate Shift Adaptation",
        authors="Schneider, Rusak, Eck, Bringmann, Brendel, Bethge",
        year=2020,
        arxiv="2006.16971",
    ),
    make=BNAlpha,
    statistics=True,
    deviations=(
        "The batch's variance is the biased one, by which training normalizes, so that alpha = 1 is exactly that; the "
        "official code mixes in the unbiased one, n / (n - 1) times as large for n values of a channel.",
    ),
    verified=("the formula written out in float64", "alpha = 0 against plain evaluation, bit for bit"),
)
