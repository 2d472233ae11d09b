"""A run's record on disk: what was run, what happened in every round, where it can go on, and what came out.

    RUNS/fedbn-batch_norm-digits-seed1-0123456789ab/
        run.json                  the resolved configuration, its hash, versions, the plan, the data's title and notes
        rounds.jsonl              one line a round: every client's metrics
        clients/*.parquet         of a federation of more than 512 clients, these, a file a round
        checkpoint.safetensors    the server's tensors, its optimizer's, every client's; the round; while it runs
        previous.safetensors      the checkpoint before that one
        model.safetensors         the final server tensors
        evaluated.safetensors     a stream's tensors in its last evaluation, where the learner evaluates others
        clients.safetensors       every client's final local tensors, as client/key; where the strategy keeps any
        clients.sqlite            of a federation of more than 512 clients in place of these, and of what checkpoints
                                  have of them, from the first round on: a row for each client that has trained
        personal.safetensors      what stands in each client's own network in place of the server's, likewise; where the
                                  strategy evaluates clients with another (Ditto's own model, a fine-tuned one)
        further.safetensors       what else a longer run goes on with (:mod:`fednorm.records.further`)
    result.json               the result; there once the run has finished

A continual run's record has ``experiences.jsonl``, one line an experience, in place of ``rounds.jsonl``; its checkpoint
holds the learner's tensors, and what else it needs as JSON in the file's metadata. Every checkpoint says besides which
tensors it has, of which shapes, and what identifies the data it was trained on: a run goes on with all of it or not at
all.

Files are replaced whole, never half, and are on the disk before what they stand in for is removed. Each carries the
hash of the run's configuration and a digest of its content (:mod:`fednorm.records.integrity`), the checkpoint besides
that of the lines before it, the result those of all that belongs to it. What does not fit is named and never used.
Lines written after the checkpoint are dropped on resume, damaged or not: what they tell of is run again, to the same
numbers. Where the checkpoint is damaged, or lines that belong to it are, the run goes on from the one before it, and
says so; where neither is whole, it starts over once its user has removed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fednorm.records.files as files
from fednorm.config import RunConfig
from fednorm.errors import RecordError
from fednorm.records.checkpoint import Checkpoint, Checkpoints
from fednorm.records.columns import content_of, in_columns, tables
from fednorm.records.folder import Folder, Tensors
from fednorm.records.formats import Unfit
from fednorm.records.integrity import (
    UNREADABLE,
    digest_of,
    read_chain,
    read_document,
    read_result,
    read_tensors,
    reason,
)
from fednorm.records.journal import Journal
from fednorm.records.leftovers import anything_stands, beside_a_result, not_there, nothing_left, remove_empty
from fednorm.records.states import STATES, States
from fednorm.records.versions import versions

ABOUT, RESULT = "run.json", "result.json"
MODEL, CLIENTS, EVALUATED = "model.safetensors", "clients.safetensors", "evaluated.safetensors"
PERSONAL, FURTHER = "personal.safetensors", "further.safetensors"

UNITS: Mapping[str, str] = {"federated": "round", "continual": "experience", "federated_continual": "round"}
"""What a line of the file is of that grows while a run goes, by kind; the file is called ``rounds.jsonl``."""


class RunRecord:
    """The record of one run. Nothing is written before :meth:`prepare`.

    Args:
        root: The folder that holds records.
        config: The run's configuration.

    Attributes:
        folder: The run's folder.
        config: The configuration.
        states: The table of what the clients of a large federation keep.
        columns: Whether what clients report goes to a file of columns a round (:mod:`fednorm.records.columns`), as it
            does in a large federation.
    """

    def __init__(self, root: Path, config: RunConfig) -> None:
        self.folder = Path(root).absolute() / f"{config.title}-{config.hash}"
        self.config = config
        self._folder = Folder(self.folder, config.hash)
        unit = UNITS[config.kind]
        self._journal = Journal(self._folder, f"{unit}s.jsonl")
        self.states, self.columns = States(self._folder), False
        self._checkpoints = Checkpoints(self._folder, self._journal, unit, self.states)

    def prepare(self) -> None:
        """Make the run's folder.

        Raises:
            RecordError: It cannot be made or written.
        """
        with self._folder.writing("make the run's folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may probe at this moment

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the run's folder and hold the record for this process.

        Raises:
            RecordError: The folder cannot be made or written, or another process is running this very run.
        """
        with self.held(".lock", f"Another process is running this run now ({self.folder})."):
            try:
                yield
            finally:
                self.states.close()

    @contextmanager
    def held(self, name: str, who: str) -> Iterator[None]:
        """Make the run's folder and hold a lock in it; where nothing of the run stands at the end, all is removed.

        Args:
            name: The lock's file.
            who: A sentence that says who holds it, for the error.

        Raises:
            RecordError: The folder cannot be made or written, or another process holds the lock.
        """
        missing = not_there(self.folder)
        with ExitStack() as stack:
            try:
                self.prepare()
                with self._folder.writing("lock the record"):
                    stack.enter_context(files.locked(self.folder / name))
            except files.HeldError as error:
                raise RecordError(f"{who} Wait for it, or end it; then call again.") from error
            except RecordError:
                remove_empty(missing)
                raise
            with nothing_left(self.folder, missing, self._journal.name, self.stands):
                yield

    def stands(self) -> bool:
        """Return whether anything of the run is worth keeping: a result, a checkpoint or a line."""
        return anything_stands(self._journal.path, self.folder / RESULT, *self._checkpoints.paths)

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        self._folder.replace(
            ABOUT, {"config": self.config.to_dict(), "hash": self.config.hash, "versions": versions(), **about}
        )

    def append_line(self, line: Mapping[str, Any]) -> None:
        """Append the line of a round or an experience; a full disk leaves none of it."""
        self._journal.append(in_columns(self._folder, line) if self.columns else line)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the rounds or experiences, up to the first that is not whole, if any.

        Raises:
            RecordError: The file cannot be read.
        """
        return list(self._journal.chain().lines)

    def keep_lines(self, count: int) -> None:
        """Drop the lines after the first ``count``, whole or not.

        Raises:
            RecordError: The lines are another run's.
        """
        self._journal.keep(count)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the last one is kept until the next."""
        self._checkpoints.save(checkpoint)

    def load_checkpoint(self, data: str | None = None) -> Checkpoint | None:
        """Return the last checkpoint that is whole, and drop the lines after it; None where there is none.

        Without one, the lines are those of an attempt that left none, and are dropped.

        Args:
            data: The digest of the data as they are now; None not to compare.

        Warns:
            DamageWarning: The last one is damaged, and the one before it is used.

        Raises:
            RecordError: No checkpoint is whole; one is of another run, of other data or of another version of fednorm;
                or a file does not belong to this run.
        """
        self._require_about()
        checkpoint = self._checkpoints.load()
        if checkpoint:
            self._require_columns()
        if checkpoint and data is not None and checkpoint.data not in (None, data):
            raise RecordError(
                f"The checkpoint {self._checkpoints.paths[0]} was trained on other data: their digest is "
                f"{checkpoint.data}, and that of the data given now is {data}. Give the data that this run began with "
                f"(--data-dir), or choose another folder with --runs. {self._checkpoints.remedy()}"
            )
        return checkpoint

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, whole or not.

        Raises:
            RecordError: What is there is no regular file.
        """
        return bool(self._checkpoints.standing())

    def take_over(self, lines: Iterable[Mapping[str, Any]], checkpoint: Checkpoint, states: States) -> None:
        """Begin with the lines and the checkpoint of a shorter run, in place of whatever lines are there.

        Args:
            lines: Its lines.
            checkpoint: Its last checkpoint.
            states: Its table of what clients keep, from which rows are taken where the checkpoint has them there.

        Raises:
            RecordError: They cannot be written.
        """
        self._journal.keep(0)
        self.states.remove()
        for line in lines:
            self.append_line(line)
        for client in states.clients() if checkpoint.table else ():
            if kept := {key: t for key, t in states.read(client).items() if not key.startswith("personal/")}:
                self.states.write(client, checkpoint.ended, kept)
        self._checkpoints.save(checkpoint)

    def restoring(self) -> AbstractContextManager[None]:
        """Name the checkpoint, and a remedy, where its contents turn out to be unfit for the run that takes them.

        Raises:
            RecordError: In place of the errors that a missing, misshapen or unreadable entry leads to.
        """
        return self._checkpoints.restoring()

    def about(self) -> dict[str, Any]:
        """Return what ``run.json`` says; nothing where it is not there.

        Raises:
            RecordError: It is damaged, or another run's.
        """
        path = self.folder / ABOUT
        try:
            return dict(read_document(path, self.config.hash)) if files.is_there(path) else {}
        except (OSError, Unfit) as error:
            raise RecordError(
                f"{path} is not that of this run: {reason(error)}. Where this one file is damaged, remove it, and it "
                "is written again; where the folder is another run's or an older fednorm's, choose another with --runs."
            ) from error

    def _require_about(self) -> None:
        self.about()

    def _require_columns(self) -> None:
        """Refuse to go on from rounds of which what clients reported is lost."""
        try:
            for clients in tables(self.lines()):
                content_of(self.folder, clients)
        except RecordError as error:
            raise RecordError(f"{error} {self._checkpoints.remedy()}") from error

    def start_over(self) -> None:
        """Forget the rounds of an earlier attempt that left no checkpoint.

        Raises:
            RecordError: There is a checkpoint, which is not lost for a runtime that cannot use it.
        """
        self._require_about()
        if self._checkpoints.standing():
            raise RecordError(
                "This run was begun in process, and Flower's runtime cannot go on from its checkpoint. Go on with "
                f"--runtime in-process, or choose another folder with --runs. {self._checkpoints.remedy()}"
            )
        self._journal.keep(0)

    def finish(
        self,
        result: Mapping[str, Any],
        model: Tensors,
        clients: Mapping[int, Tensors] | None = None,
        evaluated: Tensors | None = None,
        personal: Mapping[int, Tensors] | None = None,
        table: bool = False,
        further: Tensors | None = None,
    ) -> None:
        """Write the final tensors and the result, and remove the checkpoint: the run has finished.

        Args:
            result: The result.
            model: The model's tensors; the server's, in a federation.
            clients: Each client's local tensors, by partition id.
            evaluated: The tensors of the model that was evaluated, where they are not those of the model.
            personal: What each client's own network has in place of the model's, by partition id.
            table: Whether clients' tensors are in the record's table, committed, and not given here.
            further: What else the last checkpoint had; None where the run cannot be gone on with.
        """
        if evaluated:
            self._folder.save_tensors(EVALUATED, evaluated)
        self._folder.save_tensors(MODEL, model)
        for name, of_clients in ((CLIENTS, clients), (PERSONAL, personal)):
            if of_clients:
                named = {f"{pid}/{key}": t for pid, tensors in of_clients.items() for key, t in tensors.items()}
                self._folder.save_tensors(name, named)
        if further is not None:
            self._folder.save_tensors(FURTHER, further)
        parts = dict(self._folder.digests) | ({STATES: self.states.digest()} if table else {})
        if chain := self._journal.chain().digests:
            self._journal.sync()
            parts[self._journal.name] = chain[-1]
        self._folder.replace(RESULT, {**result, "files": parts})
        self._checkpoints.remove()

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None; a checkpoint that a kill has left beside it is removed.

        Raises:
            RecordError: The file, or one that belongs to it, is damaged or of another run or version of fednorm.
        """
        path = self.folder / RESULT
        try:
            if not files.is_there(path):
                return None
            result, parts = read_result(path, self.config.hash)
        except UNREADABLE as error:
            if getattr(error, "errno", None):  # the folder, not the file: a name too long, no permission
                raise RecordError(f"Cannot read {path}: {reason(error)}. Choose another folder with --runs.") from error
            remedy = "Remove it, and the run is made again."
            raise RecordError(f"{path} is not a result of this run: {reason(error)}. {remedy}") from error
        for name, digest in parts.items():
            self._require_part(name, digest)
        beside_a_result(self.folder, *self._checkpoints.paths)
        return {**result, "run": str(self.folder)}

    def _require_part(self, name: str, digest: str) -> None:
        """Refuse a finished run of which a file is not the one that it has left."""
        readers: Mapping[str, Callable[[Path], str]] = {
            ABOUT: lambda path: digest_of(read_document(path, self.config.hash)),
            self._journal.name: self._digest_of_journal,
            MODEL: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
            EVALUATED: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
            CLIENTS: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
            PERSONAL: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
            STATES: lambda _: self.states.verified(),
            FURTHER: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
        }
        path = self.folder / name
        try:
            present = readers[name](path)
            if present != digest:
                raise Unfit("it is whole, but of another attempt at this run")
        except (*UNREADABLE, LookupError) as error:
            raise RecordError(
                f"{path} is not what this run has left when it finished: {reason(error)}. Take the file from a copy of "
                f"the record; or remove {self.folder / RESULT}, and the run is made again."
            ) from error

    def _digest_of_journal(self, path: Path) -> str:
        chain = read_chain(files.read(path), self.config.hash)
        if chain.broken:
            raise Unfit(chain.broken)
        try:
            for clients in tables(chain.lines):
                content_of(self.folder, clients)
        except RecordError as error:
            raise Unfit(str(error)) from error
        return chain.digest(len(chain.lines))
