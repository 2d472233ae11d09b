"""Checkpoints: where a run of either kind can go on, and the one before, in case the last turns out to be damaged."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fednorm.records.files as files
from fednorm.errors import DamageWarning, RecordError
from fednorm.records.folder import Folder, Tensors
from fednorm.records.formats import Unfit
from fednorm.records.integrity import UNREADABLE, read_tensors, reason
from fednorm.records.journal import Journal
from fednorm.records.states import States

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "previous.safetensors"

VERSION = 2
"""Of what a checkpoint holds; one of another version is refused."""

TABLE_VERSION = 3
"""Of one beside which a table has what clients keep."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run can go on.

    Attributes:
        ended: How many rounds, or experiences, have ended: as many lines belong to it.
        tensors: Everything that is a tensor, under names that the run's kind gives.
        state: What else the run needs, for JSON.
        data: The digest of the data it was trained on; None in a checkpoint that does not say.
        table: Whether what clients keep is in the record's table (:class:`~fednorm.records.states.States`) and not
            among the tensors.
    """

    ended: int
    tensors: Tensors
    state: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    table: bool = False


class _Damaged(RecordError):
    """A checkpoint that cannot be gone on from, while the one before it may do."""


class Checkpoints:
    """The last checkpoint of a run, and the one before it.

    Args:
        folder: The record's folder.
        journal: The record's journal.
        unit: What a line is of: ``round`` or ``experience``.
        states: The table of what clients keep, which checkpoints of large federations go with.
    """

    def __init__(self, folder: Folder, journal: Journal, unit: str, states: States) -> None:
        self._folder, self._journal, self._unit, self._states = folder, journal, unit, states
        self.paths = (folder.path / CHECKPOINT, folder.path / PREVIOUS)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the last one becomes the one before it, once this one is whole.

        The lines that it belongs to are on the disk before it is.
        """
        chain = self._journal.chain()
        self._journal.sync()
        table = {"clients": self._states.commit(checkpoint.ended)} if checkpoint.table else {}
        about = {
            "version": str(TABLE_VERSION if table else VERSION),
            **table,
            "ended": str(checkpoint.ended),
            "state": json.dumps(dict(checkpoint.state)),
            "journal": chain.digest(min(checkpoint.ended, len(chain.lines))),
            **({} if checkpoint.data is None else {"data": checkpoint.data}),
        }
        with self._folder.replacing(CHECKPOINT, keep=PREVIOUS) as part:
            self._folder.write_tensors(part, checkpoint.tensors, about)

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint that is whole, and drop the lines after it; None where there is none.

        Warns:
            DamageWarning: The last one is damaged, or lines that belong to it are, and the one before it is used.

        Raises:
            RecordError: None is whole; or a file is of another run, or of another version of fednorm.
        """
        damage: list[_Damaged] = []
        for path in self.standing():
            try:
                checkpoint = self._read(path)
            except _Damaged as error:
                damage.append(error)
                continue
            if damage:
                self._go_back(checkpoint, damage[0])
            self._journal.keep(checkpoint.ended)
            if checkpoint.table:
                self._states.keep(checkpoint.ended)
            else:
                self._states.remove()
            return checkpoint
        if damage:
            raise RecordError(f"{damage[0]} {self.remedy()}")
        self._journal.keep(0)
        self._states.remove()
        return None

    def standing(self) -> list[Path]:
        """Return the files that are there, the last one first.

        Raises:
            RecordError: One is no regular file.
        """
        with self.restoring():
            return [path for path in self.paths if files.is_there(path)]

    def remove(self) -> None:
        """Remove both: the run has finished."""
        for path in self.paths:
            path.unlink(missing_ok=True)

    def remedy(self) -> str:
        """Return what to do where a run cannot go on: remove what stands."""
        names = " and ".join(str(path) for path in self.paths if path.exists())
        return f"Remove {names or self.paths[0]} to start this run over."

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Name the checkpoint, and a remedy, where its contents turn out to be unfit for the run that takes them.

        Raises:
            RecordError: In place of the errors that a missing, misshapen or unreadable entry leads to.
        """
        try:
            yield
        except (*UNREADABLE, LookupError, TypeError, RuntimeError) as error:
            raise RecordError(f"{_unfit(self.paths[0], error)} {self.remedy()}") from error

    def _go_back(self, checkpoint: Checkpoint, why: RecordError) -> None:
        """Let the checkpoint before the last stand for it."""
        warnings.warn(
            f"{why} The run goes on from the checkpoint before it, after {self._unit} {checkpoint.ended}.",
            DamageWarning,
            stacklevel=2,
        )
        with self._folder.writing(f"write {CHECKPOINT}"):
            last, before = self.paths
            os.replace(before, last)

    def _read(self, path: Path) -> Checkpoint:
        """Return what a file holds, if it and the lines it belongs to are whole."""
        try:
            tensors, about = read_tensors(path, self._folder.run)
            version, known = about.get("version"), (str(VERSION), str(TABLE_VERSION))
            if version in known:
                ended, state, table = int(about["ended"]), json.loads(about["state"]), about.get("clients")
                checkpoint = Checkpoint(ended, tensors, state, about.get("data"), table is not None)
                journal = about["journal"]
        except Unfit as error:  # whole, and another's: nothing that going back would mend
            raise RecordError(f"{_unfit(path, error)} {self.remedy()}") from error
        except (*UNREADABLE, LookupError, TypeError) as error:
            raise _Damaged(_unfit(path, error)) from error
        if version not in known:
            raise RecordError(
                f"The checkpoint {path} has version {version}, and this fednorm reads {VERSION}. Go on with the "
                f"fednorm that wrote it. {self.remedy()}"
            )
        self._require_lines(path, checkpoint.ended, journal)
        if table is not None:
            self._require_table(path, checkpoint.ended, table)
        return checkpoint

    def _require_table(self, path: Path, ended: int, digest: str) -> None:
        """Refuse a table of clients that is not the one that the checkpoint was written with."""
        place = f"The table {self._states.path} of what clients keep"
        try:
            self._states.check(ended, digest)
        except Unfit as error:
            raise RecordError(f"{place} cannot be gone on from ({reason(error)}). {self.remedy()}") from error
        except UNREADABLE as error:
            raise _Damaged(
                f"{place} does not go with the checkpoint {path.name} of {self._unit} {ended} ({reason(error)})."
            ) from error

    def _require_lines(self, path: Path, ended: int, digest: str) -> None:
        """Refuse a record that has lost lines from before the checkpoint."""
        chain = self._journal.chain()
        self._journal.require_own(ended)
        known = len(chain.lines)
        why = f" ({chain.broken})" if chain.broken and known < ended else ""
        if known >= ended and chain.digest(ended) != digest:
            why = " (they are of another attempt at this run)"
        if known < ended or why:
            raise _Damaged(
                f"{self._journal.path} has the lines of {known} {self._unit}s{why}, and the checkpoint {path.name} "
                f"beside it was written after {self._unit} {ended}."
            )


def _unfit(path: Path, error: BaseException) -> str:
    how = "cannot be gone on from" if isinstance(error, RecordError | Unfit) else "is damaged"
    why = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
    return f"The checkpoint {path} {how} ({why})."
