"""Moments of the union of samples, from the samples' moments.

Averaging variances is wrong: two clients with variance 1 and means 0 and 4 have an averaged variance of 1 and a pooled
one of 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fednorm.errors import AggregationError


def pool_moments(
    means: Sequence[Tensor] | Tensor, variances: Sequence[Tensor] | Tensor, counts: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Combine the moments of k disjoint samples into those of their union.

        mean = sum_i n_i mean_i / n
        var  = sum_i n_i (var_i + (mean_i - mean)^2) / n

    Exact for biased variances (law of total variance), computed in float64. Running moments are exponential averages
    of unbiased batch variances, and the number of values behind them is taken to be proportional to the client's
    examples: pooling them is an approximation, and is named one wherever it is reported.

    Args:
        means: k tensors of shape (C,), or one of shape (k, C).
        variances: Likewise.
        counts: k weights n_i >= 0; only their ratios matter.

    Returns:
        The mean and the variance of the union, float64, shape (C,).

    Raises:
        AggregationError: There is no sample, or all weights are zero.
    """
    total = float(sum(counts))
    if not len(means) or total <= 0:
        raise AggregationError(f"Pooling needs at least one sample with a positive count; got counts {list(counts)}.")
    weight = torch.tensor(list(counts), dtype=torch.float64)[:, None] / total
    mean_k, var_k = (
        (values if isinstance(values, Tensor) else torch.stack(list(values))).to(torch.float64)
        for values in (means, variances)
    )
    mean = (weight * mean_k).sum(0)
    var = (weight * (var_k + (mean_k - mean) ** 2)).sum(0)
    return mean, var
