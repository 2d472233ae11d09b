"""Replay of traces recorded from official implementations, with fednorm's own classes and in float64.

A trace is recognised by its hyper-parameters and array keys, so that new traces of a known kind need no change here.
Adding a kind is one line in :data:`FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fednorm.errors import DataError
from fednorm.verify import (
    golden_adab2n,
    golden_adamp,
    golden_agc,
    golden_batchrenorm,
    golden_bcn,
    golden_cl_metrics,
    golden_cn,
    golden_dyt,
    golden_fedbn,
    golden_hybridbn,
    golden_powernorm,
    golden_pre_rmsnorm,
    golden_tbbn,
    golden_un,
    golden_ws,
)
from fednorm.verify.golden_trace import Family, Trace, read_trace

FAMILIES: tuple[Family, ...] = (
    *golden_ws.FAMILIES,
    *golden_agc.FAMILIES,
    *golden_fedbn.FAMILIES,
    *golden_cl_metrics.FAMILIES,
    *golden_adab2n.FAMILIES,
    *golden_cn.FAMILIES,
    *golden_tbbn.FAMILIES,
    *golden_batchrenorm.FAMILIES,
    *golden_dyt.FAMILIES,
    *golden_pre_rmsnorm.FAMILIES,
    *golden_powernorm.FAMILIES,
    *golden_un.FAMILIES,
    *golden_bcn.FAMILIES,
    *golden_hybridbn.FAMILIES,
    *golden_adamp.FAMILIES,
)


class Status(StrEnum):
    """What became of a replay."""

    PASS = "pass"
    """Everything recorded was reproduced within the tolerance."""
    FAIL = "fail"
    """Something was not, or the trace lacks what its kind needs."""
    NO_METHOD = "no method"
    """fednorm has no method for this kind of trace."""
    UNREADABLE = "unreadable"
    """The file is not a trace, or it is damaged."""


@dataclass(frozen=True)
class Replay:
    """The outcome of one trace file.

    Attributes:
        file: The file.
        method: The method it tests, or None where there is none.
        largest_error: Largest absolute error over everything compared; None where nothing was.
        status: What became of it.
        detail: What was compared, or why not; one line.
    """

    file: Path
    method: str | None
    largest_error: float | None
    status: Status
    detail: str

    @property
    def passed(self) -> bool:
        """Return whether everything recorded was reproduced."""
        return self.status is Status.PASS


def family_of(trace: Trace) -> Family | None:
    """Return the kind of a trace, or None where it is of none we know."""
    return next((family for family in FAMILIES if family.matches(trace)), None)


def replay(path: str | Path) -> Replay:
    """Replay one trace file. No content of the file makes this raise; the outcome says what is wrong.

    Args:
        path: An ``.npz`` file in the format of the golden traces.

    Returns:
        The outcome.
    """
    path = Path(path)
    try:
        trace = read_trace(path)
    except DataError as error:
        return Replay(path, None, None, Status.UNREADABLE, _line(error))
    family = family_of(trace)
    if family is None:
        return Replay(path, None, None, Status.NO_METHOD, "no method of fednorm is of this kind")
    try:
        comparisons = list(family.replay(trace))
    # A trace whose shapes or settings contradict each other fails wherever it first meets PyTorch.
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return Replay(path, family.method, None, Status.FAIL, f"cannot be replayed: {_line(error)}")
    if not comparisons:
        return Replay(path, family.method, None, Status.FAIL, "cannot be replayed: it recorded nothing to compare")
    largest = max(comparison.error for comparison in comparisons)
    wrong = [comparison for comparison in comparisons if not comparison.within(family.rtol, family.atol)]
    if wrong:
        worst = max(wrong, key=lambda comparison: comparison.error)
        shapes = f"ours {tuple(worst.ours.shape)}, recorded {tuple(worst.recorded.shape)}"
        detail = (
            f"{len(wrong)} of {len(comparisons)} arrays differ by more than {family.atol:g} + {family.rtol:g} "
            f"|recorded|; the worst is {worst.key} ({shapes})"
        )
        return Replay(path, family.method, largest, Status.FAIL, detail)
    reproduced = f"{len(comparisons)} arrays reproduced"
    return Replay(path, family.method, largest, Status.PASS, "; ".join(filter(None, (reproduced, family.note(trace)))))


def replay_folder(folder: str | Path) -> list[Replay]:
    """Replay every ``.npz`` file of a folder, in the order of their names.

    Raises:
        DataError: There is no such folder, or it holds no such file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}; give the folder that holds the .npz traces.")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise DataError(f"The folder {folder} holds no .npz trace.")
    return [replay(file) for file in files]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
