"""Accuracy matrices and what is read off them.

``R[i, j]`` is the accuracy on experience j (0-based) after training on experience i: row i is complete when experience
i has ended. Every function takes the first n rows of a stream of T >= n experiences, shape (n, T), so that a run that
has not ended is measured on what it has seen; ``R[n - 1]`` is "the last row". Any unit will do (shares, percent): the
result has the same. Entries that a formula does not use may be NaN.

Two conventions of forgetting are in use and differ by points; here each has its name:

* *max minus last* (Chaudhry et al., arXiv 1801.10112; mammoth and AdaB2N's code), and
* *first minus last* (Avalanche; the negative of backward transfer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fednorm.errors import ConfigError, DataError

Floats = npt.NDArray[np.float64]
Matrix = npt.ArrayLike


@dataclass(frozen=True)
class Point:
    """One evaluation while a stream is learned.

    Attributes:
        experience: The experience that is trained on, from 0.
        accuracy: On each experience from 0 to that one, or of the whole stream; NaN where it was not measured.
    """

    experience: int
    accuracy: tuple[float, ...]


def average_accuracy(matrix: Matrix) -> float:
    """Return the accuracy after the last experience, averaged over the experiences seen.

    ``ACC = 1/n * sum_{j < n} R[n-1, j]`` (Lopez-Paz, Ranzato, arXiv 1706.08840; "final average accuracy" in mammoth).
    Experiences weigh equally, however many test images they have.

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    r = _matrix(matrix)
    return _mean(r[-1, : len(r)], "average accuracy")


def average_incremental_accuracy(matrix: Matrix) -> float:
    """Return the average accuracy of every row, averaged over the rows.

    ``1/n * sum_{i < n} 1/(i+1) * sum_{j <= i} R[i, j]`` (Rebuffi et al., arXiv 1611.07725).

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    r = _matrix(matrix)
    return _mean(np.array([r[i, : i + 1].mean() for i in range(len(r))]), "average incremental accuracy")


def max_minus_last_by_experience(matrix: Matrix, *, zero_shot: bool = False) -> Floats:
    """Return the forgetting of each experience but the last, as its best accuracy minus its last, shape (n - 1,).

    ``F_j = max_{j <= i <= n-1} R[i, j] - R[n-1, j]``. The last row is among those the maximum is over, as in mammoth,
    so that it is never negative; Chaudhry et al. leave it out, so that theirs is negative for an experience that ends
    at its best.

    Args:
        matrix: R, shape (n, T).
        zero_shot: Whether the accuracy just *before* the experience, ``R[j-1, j]``, may be its best. mammoth's trainer
            stores it, and so counts it, when forward transfer is recorded.

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    r = _matrix(matrix)
    n = len(r)
    best = np.array([r[max(j - int(zero_shot), 0) :, j].max() for j in range(n - 1)], dtype=np.float64)
    return _finite(best - r[-1, : n - 1], "forgetting (max minus last)")


def first_minus_last_by_experience(matrix: Matrix) -> Floats:
    """Return the forgetting of each experience but the last, as its first accuracy minus its last, shape (n - 1,).

    ``F_j = R[j, j] - R[n-1, j]``: Avalanche's. Negative where later experiences helped.

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    r = _matrix(matrix)
    n = len(r)
    return _finite(np.diagonal(r)[: n - 1] - r[-1, : n - 1], "forgetting (first minus last)")


def forgetting_max_minus_last(matrix: Matrix, *, zero_shot: bool = False) -> float:
    """Return the mean of :func:`max_minus_last_by_experience`; 0 after one experience.

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    return _mean_or_zero(max_minus_last_by_experience(matrix, zero_shot=zero_shot))


def forgetting_first_minus_last(matrix: Matrix) -> float:
    """Return the mean of :func:`first_minus_last_by_experience`; 0 after one experience.

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    return _mean_or_zero(first_minus_last_by_experience(matrix))


def backward_transfer(matrix: Matrix) -> float:
    """Return what later experiences did to earlier ones; 0 after one experience.

    ``BWT = 1/(n-1) * sum_{j < n-1} (R[n-1, j] - R[j, j])`` (Lopez-Paz, Ranzato, arXiv 1706.08840): the negative of
    :func:`forgetting_first_minus_last`.

    Raises:
        DataError: ``matrix`` is no accuracy matrix, or an entry that is needed is not finite.
    """
    return _mean_or_zero(-first_minus_last_by_experience(matrix))


def forward_transfer_by_experience(matrix: Matrix, untrained: Sequence[float] | Floats) -> Floats:
    """Return what earlier experiences did for each experience but the first, before it was seen, shape (n - 1,).

    ``FWT_j = R[j-1, j] - b_j`` for j = 1 to n - 1 (Lopez-Paz, Ranzato, arXiv 1706.08840).

    Args:
        matrix: R, shape (n, T); the entries one above the diagonal are needed.
        untrained: b, the accuracy of the untrained model on every experience, shape (T,).

    Raises:
        DataError: ``matrix`` is no accuracy matrix, ``untrained`` is not as long as its rows, or an entry that is
            needed is not finite.
    """
    r = _matrix(matrix)
    baseline = np.asarray(untrained, dtype=np.float64)
    if baseline.shape != r.shape[1:]:
        raise DataError(
            f"Forward transfer needs the untrained model's accuracy on each of {r.shape[1]} experiences; "
            f"got shape {baseline.shape}."
        )
    n = len(r)
    return _finite(np.diagonal(r, offset=1)[: n - 1] - baseline[1:n], "forward transfer")


def forward_transfer(matrix: Matrix, untrained: Sequence[float] | Floats) -> float:
    """Return the mean of :func:`forward_transfer_by_experience`; 0 after one experience.

    Raises:
        DataError: As there.
    """
    return _mean_or_zero(forward_transfer_by_experience(matrix, untrained))


def online_accuracy(
    correct: Sequence[int] | npt.NDArray[np.int64], seen: Sequence[int] | npt.NDArray[np.int64]
) -> float:
    """Return the share of new samples that the model got right just before it was trained on them.

    ``sum_t correct_t / sum_t seen_t`` over the batches t of an experience or a stream (Cai, Sener, Koltun, arXiv
    2108.09020): the samples weigh equally, also where the last batch is small. Samples from a buffer do not count.
    Over the batches of every pass it is NaP's average over all steps of a task (Lyle et al., arXiv 2407.01800).

    Args:
        correct: Right predictions of each batch's new samples.
        seen: Number of each batch's new samples.

    Raises:
        DataError: The two do not fit together, or nothing was seen.
    """
    right, total = np.asarray(correct), np.asarray(seen)
    if right.shape != total.shape or (right < 0).any() or (right > total).any():
        raise DataError(
            f"Online accuracy needs, for every batch, how many of its samples were right; got shapes {right.shape} "
            f"and {total.shape}, with {right.sum()} right of {total.sum()}."
        )
    if not total.sum():
        raise DataError("Online accuracy needs one new sample or more; got none.")
    return float(right.sum() / total.sum())


def average_minimum_accuracy(points: Sequence[Point]) -> float:
    """Return how low the accuracy on an earlier experience falls while later ones are learned, averaged.

    ``min-ACC_k = 1/(k-1) * sum_{i < k} min_n A(E_i, f_n)``, n over every evaluation after experience i has ended, for
    the present experience k (from 1 here). Evaluations at experiences' ends alone miss the stability gap: the fall
    just after a new experience begins, mostly made good before it ends (De Lange, van de Ven, Tuytelaars, Continual
    evaluation for lifelong learning: identifying the stability gap, ICLR 2023, arXiv 2205.13452).

    Args:
        points: Evaluations in the order of training, those at experiences' ends among them.

    Raises:
        DataError: There is no experience before the last one, or one was not evaluated after its end.
    """
    last = _last(points)
    later = [
        [point.accuracy[number] for point in points if point.experience > number] for number in range(last.experience)
    ]
    if not later or not all(later):
        raise DataError("The average minimum accuracy needs evaluations of experiences after the end of each.")
    return _mean(np.array([np.min(values) for values in later]), "average minimum accuracy")


def worst_case_accuracy(points: Sequence[Point]) -> float:
    """Return the present experience's accuracy and the worst of the earlier ones', each experience weighing alike.

    ``WC-ACC = 1/k * A(E_k, f_n) + (1 - 1/k) * min-ACC_k`` (De Lange et al., arXiv 2205.13452), with the last
    evaluation n and :func:`average_minimum_accuracy`; the accuracy itself where there is one experience only.

    Raises:
        DataError: As there.
    """
    last = _last(points)
    count = last.experience + 1
    present = _mean(np.array(last.accuracy[last.experience : count]), "worst-case accuracy")
    return present / count + (1 - 1 / count) * average_minimum_accuracy(points) if count > 1 else present


def average_late_accuracy(points: Sequence[Point], *, last: int) -> float:
    """Return the average accuracy of the last evaluations, averaged: one alone moves by points within some steps.

    Args:
        points: Evaluations in the order of training.
        last: How many count, at most; only those since the last experience began do.

    Raises:
        DataError: There is none, or an entry that is needed is not finite.
    """
    present = _last(points).experience
    late = [point.accuracy for point in points if point.experience == present][-last:]
    return _mean(np.array(late, dtype=np.float64), "average late accuracy")


def plasticity(by_experience: Sequence[float] | Floats, *, share: float = 0.1) -> float:
    """Return the mean over the last experiences of what was reached in each, e.g. its training or online accuracy.

    The last ``max(1, round(share * n))`` of n count: a learner that loses plasticity is worse late than early (arXiv
    2410.20098 reports the last tenth).

    Raises:
        ConfigError: ``share`` is not in (0, 1].
        DataError: There is no experience, or a value is not finite.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"plasticity takes a share of the experiences in (0, 1]; got {share!r}.")
    values = np.asarray(by_experience, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise DataError(f"plasticity needs one value for each experience; got shape {values.shape}.")
    return _mean(values[-max(1, round(share * len(values))) :], "plasticity")


def _matrix(matrix: Matrix) -> Floats:
    r = np.asarray(matrix, dtype=np.float64)
    if r.ndim != 2 or not len(r) or len(r) > r.shape[1]:
        raise DataError(
            "An accuracy matrix has a row for each experience that has ended and a column for each of the stream, "
            f"so at least as many columns as rows, and one row or more; got shape {r.shape}."
        )
    return r


def _last(points: Sequence[Point]) -> Point:
    if not points:
        raise DataError("Accuracies while a stream is learned need one evaluation or more; got none.")
    return points[-1]


def _finite(values: Floats, what: str) -> Floats:
    if not np.isfinite(values).all():
        where = np.flatnonzero(~np.isfinite(values)).tolist()
        raise DataError(f"The {what} needs accuracies that are missing (NaN) or infinite: entries {where} of {values}.")
    return values


def _mean(values: Floats, what: str) -> float:
    return float(_finite(values, what).mean())


def _mean_or_zero(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0
