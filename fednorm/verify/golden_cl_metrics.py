"""Replay of the metrics that mammoth and Avalanche compute from one accuracy matrix.

What mammoth's function leaves in the rows it is given, padded with zeros in place, is not a metric and not compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fednorm.streams import metrics
from fednorm.verify.golden_trace import Comparison, Family, Trace


def _matches(trace: Trace) -> bool:
    return {"acc_matrix", "random_baseline"} <= trace.arrays.keys()


def _replay(trace: Trace) -> Iterator[Comparison]:
    matrix, untrained = trace.tensor("acc_matrix").numpy(), trace.tensor("random_baseline").numpy()
    forgetting = metrics.first_minus_last_by_experience(matrix)
    ours = {
        "mammoth.backward_transfer": metrics.backward_transfer(matrix),
        "mammoth.forward_transfer": metrics.forward_transfer(matrix, untrained),
        "mammoth.forgetting_lower_triangle": metrics.forgetting_max_minus_last(matrix),
        "mammoth.forgetting_with_one_future_column": metrics.forgetting_max_minus_last(matrix, zero_shot=True),
        "avalanche.forgetting_per_task": forgetting,
        "avalanche.bwt_per_task": -forgetting,
        "avalanche.forward_transfer_per_task": metrics.forward_transfer_by_experience(matrix, untrained),
        "avalanche.stream_forgetting_after_each_task": [
            metrics.forgetting_first_minus_last(matrix[: ended + 1]) for ended in range(len(matrix))
        ],
    }
    for key, value in ours.items():
        yield Comparison(key, _tensor(value), trace.tensor(key))


def _tensor(value: object) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _note(trace: Trace) -> str:
    padded = [key for key in trace.arrays if key.endswith("_after_call")]
    return f"not metrics and not compared: {', '.join(padded)}" if padded else ""


FAMILIES = (
    Family(
        method="continual metrics (mammoth, Avalanche)",
        matches=_matches,
        replay=_replay,
        rtol=0,
        atol=1e-10,
        note=_note,
    ),
)
