"""What is measured of a grid: the accuracy tensor, and what is forgotten over time and over space.

``R[t][k][i]`` is the accuracy of client k's network on the test images of experience i after time t, None where it has
not met it. There are two of them: ``aggregated``, of the network that the server sent, under the client's own local
tensors; and ``own``, of the network that the client had just trained, before the server averaged.

Temporal forgetting is the stream's (:mod:`fednorm.streams.metrics`), of each client's rows in the order in which it met
the experiences, averaged over clients. Spatial forgetting is what aggregation takes from a client's own network:

    S_t = mean over clients k and the experiences i that k has met by t of  own[t][k][i] - aggregated[t][k][i]

The drift of client k by time t is how far its running statistics, just trained, are from those of all clients that
trained pooled (:func:`~fednorm.federation.diagnosis.drift_by_domain`), the mean over layers. Spatial forgetting is
after Yang et al., Federated Continual Learning via Knowledge Fusion, arXiv 2312.16475, who name the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from fednorm.streams import metrics
from fednorm.streams.metrics import Floats

Row = Sequence[float | None]
Tensor3 = Sequence[Sequence[Row]]
"""By time, client and experience."""

Unheard = Sequence[tuple[int, int]]
"""Times and clients."""


def spatial_forgetting(own: Sequence[Row], aggregated: Sequence[Row]) -> float | None:
    """Return S_t of one time, whose rows are given by client; None where no client has met anything."""
    gaps = [
        mine - theirs
        for own_row, row in zip(own, aggregated, strict=True)
        for mine, theirs in zip(own_row, row, strict=True)
        if mine is not None and theirs is not None
    ]
    return mean(gaps) if gaps else None


def average(rows: Sequence[Row]) -> float | None:
    """Return the mean over clients of each one's mean over the experiences that it has met, of one time."""
    return _mean(_by_client(rows))


def _by_client(rows: Sequence[Row]) -> list[float]:
    """Return the mean of each client that has met anything."""
    met = [[x for x in row if x is not None] for row in rows]
    return [mean(row) for row in met if row]


@dataclass(frozen=True)
class Course:
    """What a client met.

    Attributes:
        cells: The time and the experience's number of each of its cells, in order.
        last: The last time at which it was there.
    """

    cells: tuple[tuple[int, int], ...]
    last: int


def matrix_of(tensor: Tensor3, client: int, course: Course) -> Floats:
    """Return a client's accuracy matrix: a row for each of its cells and a column too, in the order in which they came.

    The last row is of the last time at which the client was there, which may be later than its last cell.

    Args:
        tensor: The accuracy tensor.
        client: The client.
        course: What it met.
    """
    times = [time for time, _ in course.cells[:-1]] + [course.last]
    rows = [[tensor[time][client][number] for _, number in course.cells] for time in times]
    return np.array(rows, dtype=np.float64)


def final(
    aggregated: Tensor3, own: Tensor3, courses: Sequence[Course], drift: Sequence[Row] = (), unheard: Unheard = ()
) -> dict[str, Any]:
    """Return the numbers of a whole run.

    ``average_accuracy``: the mean over clients of each one's mean over the experiences that it has met, after the last
    time; ``worst_client``: the least of those. The forgettings are means over the clients that met two experiences or
    more, ``spatial_forgetting`` and ``drift`` over all times. ``unheard``, where there is any, says which clients gave
    no accuracies when an experience had ended: a client's matrix that lacks numbers for it is left out of the means,
    and a mean over nobody is None.

    Args:
        aggregated: Of the networks that the server sent.
        own: Of those that clients had trained.
        courses: What each client met.
        drift: Of running statistics, by time and client.
        unheard: The times and clients.
    """
    accuracies = _by_client(aggregated[-1])
    matrices = [matrix_of(aggregated, client, course) for client, course in enumerate(courses)]
    matrices = [matrix for matrix in matrices if not np.isnan(matrix[np.tril_indices(len(matrix))]).any()]
    several = [matrix for matrix in matrices if len(matrix) > 1]
    spatial = [spatial_forgetting(mine, theirs) for mine, theirs in zip(own, aggregated, strict=True)]
    drifts = [value for row in drift for value in row if value is not None]
    missing = [{"experience": time, "client": client} for time, client in unheard]
    return {
        "average_accuracy": _mean(accuracies),
        "worst_client": min(accuracies, default=None),
        "average_incremental_accuracy": _mean(metrics.average_incremental_accuracy(m) for m in matrices),
        "forgetting_max_minus_last": _mean(metrics.forgetting_max_minus_last(m) for m in several),
        "forgetting_first_minus_last": _mean(metrics.forgetting_first_minus_last(m) for m in several),
        "spatial_forgetting": _mean(value for value in spatial if value is not None),
        **({"drift": mean(drifts)} if drifts else {}),
        **({"unheard": missing} if missing else {}),
    }


def means(lines: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean over lines of each number that all of them have; None where one was not measured."""
    shared = [key for key in lines[0] if all(key in line for line in lines)]
    values = {key: [value for line in lines if (value := line[key]) is not None] for key in shared}
    return {key: mean(numbers) if len(numbers) == len(lines) else None for key, numbers in values.items()}


def temporal_forgetting(aggregated: Tensor3, courses: Sequence[Course], time: int) -> float | None:
    """Return what has been forgotten by a time: the mean over clients of their best accuracy so far minus today's.

    Of each client the mean over the experiences that it had met before, as
    :func:`~fednorm.streams.metrics.forgetting_max_minus_last` has it after the last; None where nobody had met any.

    Args:
        aggregated: Of the networks that the server sent.
        courses: What each client met.
        time: The time.
    """
    lost = []
    for client, course in enumerate(courses):
        own = []
        for met, number in course.cells:
            row = [aggregated[when][client][number] for when in range(met, time + 1)] if met < time else []
            if None not in row and row:
                known = [value for value in row if value is not None]
                own.append(max(known) - known[-1])
        lost += [mean(own)] if own else []
    return _mean(lost)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return mean(numbers) if numbers else None
