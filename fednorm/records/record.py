"""A run's record on disk: what was run, what happened in every round, where it can go on, and what came out.

    RUNS/fedbn-batch_norm-digits-seed1-0123456789ab/
        run.json                  the resolved configuration, its hash, versions, the plan, the data's title and notes
        rounds.jsonl              one line a round: every client's metrics
        checkpoint.safetensors    the server's tensors, its optimizer's, every client's; the round; while it runs
        model.safetensors         the final server tensors
        evaluated.safetensors     a stream's tensors in its last evaluation, where the learner evaluates others
        clients.safetensors       every client's final local tensors, as client/key; where the strategy keeps any
        result.json               the result; there once the run has finished

A continual run's record has ``experiences.jsonl``, one line an experience, in place of ``rounds.jsonl``; its checkpoint
holds the learner's tensors, and what else it needs as JSON in the file's metadata. Every checkpoint says besides which
tensors it has, of which shapes, and what identifies the data it was trained on: a run goes on with all of it or not at
all.

Files are replaced whole, never half, and are on the disk before what they stand in for is removed. Each carries the
hash of the run's configuration and a digest of its content (:mod:`fednorm.records.integrity`), the checkpoint besides
that of the lines before it, the result those of all that belongs to it. What does not fit is named and never used.
Lines written after the checkpoint are dropped on resume, damaged or not: what they tell of is run again, to the same
numbers. One checkpoint is kept: where it is damaged, the run starts over, to the same numbers again, once its user has
removed it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import fednorm.records.files as files
from fednorm.config import RunConfig
from fednorm.errors import RecordError
from fednorm.records.formats import Unfit
from fednorm.records.integrity import (
    UNREADABLE,
    Chain,
    apart,
    chained,
    digest_of,
    read_chain,
    read_document,
    read_result,
    read_tensors,
    reason,
    sealed,
    tensors_metadata,
)
from fednorm.records.leftovers import anything_stands, beside_a_result, not_there, nothing_left, remove_empty
from fednorm.records.versions import versions

Tensors = dict[str, Tensor]

ABOUT, RESULT = "run.json", "result.json"
CHECKPOINT, MODEL, CLIENTS = "checkpoint.safetensors", "model.safetensors", "clients.safetensors"
EVALUATED = "evaluated.safetensors"

CHECKPOINT_VERSION = 1
"""Of the checkpoint of a continual run; a checkpoint of another version is refused."""

LINES: Mapping[str, str] = {"federated": "rounds.jsonl", "continual": "experiences.jsonl"}
"""The file of a record that grows while a run goes, by kind."""


@dataclass
class Checkpoint:
    """Where a run can go on.

    Attributes:
        server_round: The last finished round.
        server: The server's tensors after it.
        strategy: The strategy's own tensors.
        clients: Each client's local tensors, by partition id.
        remembered: What each client's optimizer and effects remember, by partition id.
        states: What each client's side of the strategy keeps under names of its own, by partition id.
        data: The digest of the data it was trained on; None in a checkpoint that does not say.
    """

    server_round: int
    server: Tensors
    strategy: Tensors = field(default_factory=dict)
    clients: dict[int, Tensors] = field(default_factory=dict)
    remembered: dict[int, Tensors] = field(default_factory=dict)
    states: dict[int, Tensors] = field(default_factory=dict)
    data: str | None = None


class RunRecord:
    """The record of one run. Nothing is written before :meth:`prepare`.

    Args:
        root: The folder that holds records.
        config: The run's configuration.
    """

    def __init__(self, root: Path, config: RunConfig) -> None:
        self.folder = Path(root).absolute() / f"{config.title}-{config.hash}"
        self.config = config
        self._checkpoint = self.folder / CHECKPOINT
        self._lines = LINES[config.kind]
        self._journal = self.folder / self._lines
        self._chain, self._seen = Chain(), files.NO_FILE  # the journal when it was last read or written
        self._digests: dict[str, str] = {}  # of the files that this process has written, by name

    def prepare(self) -> None:
        """Make the run's folder.

        Raises:
            RecordError: It cannot be made or written.
        """
        with self._writing("make the run's folder"):
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
        missing = not_there(self.folder)
        try:
            self.prepare()
            with self._writing("lock the record"):
                handle = (self.folder / ".lock").open("w")
        except RecordError:
            remove_empty(missing)
            raise
        with handle:
            with self._writing("lock the record"):
                self._lock(handle)
            with nothing_left(self.folder, missing, self._lines, self.stands):
                yield

    def stands(self) -> bool:
        """Return whether anything of the run is worth keeping: a result, a checkpoint or a line."""
        return anything_stands(self._journal, self.folder / RESULT, self._checkpoint)

    def _lock(self, handle: TextIO) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(
                f"Another process is running this run now ({self.folder}). Wait for it, or end it; then call again."
            ) from error

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        self._replace(
            ABOUT, {"config": self.config.to_dict(), "hash": self.config.hash, "versions": versions(), **about}
        )

    def append_line(self, line: Mapping[str, Any]) -> None:
        """Append the line of a round or an experience; a full disk leaves none of it."""
        chain = self._read_journal()
        count = len(chain.lines)
        whole = chained(line, count + 1, self.config.hash, chain.digest(count))
        with self._writing(f"append to {self._lines}"):
            size = files.append(self._journal, json.dumps(whole, allow_nan=False).encode() + b"\n")
            self._seen = files.state(self._journal)
        chain.lines.append({key: value for key, value in whole.items() if key not in ("line", "hash", "digest")})
        chain.digests.append(whole["digest"])
        chain.ends.append(size)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the rounds or experiences, up to the first that is not whole, if any.

        Raises:
            RecordError: The file cannot be read.
        """
        return list(self._read_journal().lines)

    def keep_lines(self, count: int) -> None:
        """Drop the lines after the first ``count``, whole or not.

        Raises:
            RecordError: The lines are another run's.
        """
        chain = self._read_journal()
        self._require_own_lines(count)
        size = files.state(self._journal)[1]
        end = chain.ends[:count][-1] if chain.ends[:count] else 0
        if size == end:
            return
        with self._writing(f"write {self._lines}"):
            kept = files.read(self._journal)[:end]
        with self._replacing(self._lines) as part:
            part.write_bytes(kept if kept.endswith(b"\n") or not kept else kept + b"\n")

    def _require_own_lines(self, count: int) -> None:
        chain = self._read_journal()
        if chain.foreign and len(chain.lines) <= count:
            raise RecordError(
                f"{self._journal} does not belong here: {chain.broken}. Put it back into that run's folder; or remove "
                "it, and the checkpoint beside it where there is one, to start this run over."
            )

    def _read_journal(self) -> Chain:
        """Return the lines that are there, read again if another process has written to the file."""
        try:
            state = files.state(self._journal)
            if state != self._seen:
                content = files.read(self._journal) if state != files.NO_FILE else b""
                self._chain, self._seen = read_chain(content, self.config.hash), state
        except OSError as error:
            raise RecordError(
                f"{self._journal} cannot be read: {reason(error)}. Remove it, and the checkpoint beside it, to start "
                "this run over."
            ) from error
        return self._chain

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        tensors = {f"server/{key}": tensor for key, tensor in checkpoint.server.items()}
        tensors |= {f"strategy/{key}": tensor for key, tensor in checkpoint.strategy.items()}
        for place, of_clients in _of_clients(checkpoint).items():
            for partition_id, own in of_clients.items():
                tensors |= {f"{place}/{partition_id}/{key}": tensor for key, tensor in own.items()}
        about = {} if checkpoint.data is None else {"data": checkpoint.data}
        self._save_checkpoint(tensors, {"round": str(checkpoint.server_round), **about}, checkpoint.server_round)

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint, and drop the lines of later rounds; None where there is none.

        Raises:
            RecordError: A file of the record is damaged, of another run, or of another version of fednorm.
        """
        if not self._open():
            return None
        with self.restoring():
            tensors, about = read_tensors(self._checkpoint, self.config.hash)
            checkpoint = Checkpoint(int(about["round"]), {}, data=about.get("data"))
            for key, tensor in tensors.items():
                place, name = key.split("/", 1)
                if place in (places := _of_clients(checkpoint)):
                    partition_id, name = name.split("/", 1)
                    places[place].setdefault(int(partition_id), {})[name] = tensor
                else:
                    (checkpoint.server if place == "server" else checkpoint.strategy)[name] = tensor
        self._require_lines(checkpoint.server_round, "round", about["journal"])
        return checkpoint

    def save_state(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint of a continual run.

        Args:
            tensors: The learner's tensors.
            state: What else it needs, for JSON; ``experiences``, how many have ended, among it.
        """
        document = json.dumps({"version": CHECKPOINT_VERSION, **state})
        self._save_checkpoint(tensors, {"state": document}, state["experiences"])

    def load_state(self) -> tuple[Tensors, dict[str, Any]] | None:
        """Return what :meth:`save_state` wrote, and drop the lines of later experiences; None where there is none.

        Raises:
            RecordError: A file of the record is damaged, of another run, or of another version of fednorm.
        """
        if not self._open():
            return None
        with self.restoring():
            tensors, about = read_tensors(self._checkpoint, self.config.hash)
            state = json.loads(about["state"])
            version_found, ended = state["version"], int(state["experiences"])
        if version_found != CHECKPOINT_VERSION or isinstance(version_found, bool):
            raise RecordError(
                f"The checkpoint {self._checkpoint} has version {version_found}, and this fednorm reads "
                f"{CHECKPOINT_VERSION}. Go on with the fednorm that wrote it, or remove the file to start this run "
                "over."
            )
        self._require_lines(ended, "experience", about["journal"])
        return tensors, state

    def require_data(self, trained_on: str | None, present: str) -> None:
        """Refuse to go on from the checkpoint with other data than it was trained on.

        Args:
            trained_on: The digest that the checkpoint has; None, as older ones have, is not compared.
            present: The digest of the data as they are now.

        Raises:
            RecordError: The two differ.
        """
        if trained_on is not None and trained_on != present:
            raise RecordError(
                f"The checkpoint {self._checkpoint} was trained on other data: their digest is {trained_on}, and that "
                f"of the data given now is {present}. Give the data that this run began with (--data-dir), choose "
                "another folder with --runs, or remove the file to start this run over on the data given now."
            )

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Name the checkpoint, and a remedy, where its contents turn out to be unfit for the run that takes them.

        Raises:
            RecordError: In place of the errors that a missing, misshapen or unreadable entry leads to.
        """
        try:
            yield
        except (*UNREADABLE, LookupError, TypeError, RuntimeError) as error:
            how = "cannot be gone on from" if isinstance(error, RecordError | Unfit) else "is damaged"
            why = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
            raise RecordError(
                f"The checkpoint {self._checkpoint} {how} ({why}). Remove the file to start this run over."
            ) from error

    def _save_checkpoint(self, tensors: Tensors, about: Mapping[str, str], count: int) -> None:
        """Replace the checkpoint, which belongs to the first ``count`` lines; they are on the disk before it is."""
        chain = self._read_journal()
        self._sync_journal()
        journal = chain.digest(min(count, len(chain.lines)))
        self._save_tensors(CHECKPOINT, tensors, {**about, "journal": journal})

    def _sync_journal(self) -> None:
        with self._writing(f"append to {self._lines}"):
            if files.is_there(self._journal):
                files.sync(self._journal)

    def _open(self) -> bool:
        """Return whether there is a checkpoint; without one, the lines are those of an attempt that left none.

        Raises:
            RecordError: A file does not belong to this run, or is no file.
        """
        self._require_about()
        with self.restoring():
            begun = files.is_there(self._checkpoint)
        if not begun:
            self.keep_lines(0)
        return begun

    def _require_about(self) -> None:
        path = self.folder / ABOUT
        try:
            if files.is_there(path):
                read_document(path, self.config.hash)
        except (OSError, Unfit) as error:
            raise RecordError(
                f"{path} is not that of this run: {reason(error)}. Where this one file is damaged, remove it, and it "
                "is written again; where the folder is another run's or an older fednorm's, choose another with --runs."
            ) from error

    def _require_lines(self, count: int, what: str, journal: str) -> None:
        """Drop what was written after the checkpoint, and refuse a record that has lost what came before it."""
        chain = self._read_journal()
        self._require_own_lines(count)
        known = len(chain.lines)
        why = f" ({chain.broken})" if chain.broken and known < count else ""
        if known >= count and chain.digest(count) != journal:
            why = " (they are of another attempt at this run)"
        if known < count or why:
            raise RecordError(
                f"{self._journal} has the lines of {known} {what}s{why}, and the checkpoint beside it was written "
                f"after {what} {count}. Remove {self._checkpoint} to start this run over."
            )
        self.keep_lines(count)

    def start_over(self) -> None:
        """Forget the rounds of an earlier attempt that left no checkpoint.

        Raises:
            RecordError: There is a checkpoint, which is not lost for a runtime that cannot use it.
        """
        if self._open():
            raise RecordError(
                f"This run was begun in process, and Flower's runtime cannot go on from its checkpoint. Go on with "
                f"--runtime in-process, choose another folder with --runs, or remove {self._checkpoint}."
            )

    def finish(
        self,
        result: Mapping[str, Any],
        model: Tensors,
        clients: Mapping[int, Tensors] | None = None,
        evaluated: Tensors | None = None,
    ) -> None:
        """Write the final tensors and the result, and remove the checkpoint: the run has finished.

        Args:
            result: The result.
            model: The model's tensors; the server's, in a federation.
            clients: Each client's local tensors, by partition id.
            evaluated: The tensors of the model that was evaluated, where they are not those of the model.
        """
        if evaluated:
            self._save_tensors(EVALUATED, evaluated)
        self._save_tensors(MODEL, model)
        if clients:
            local = {f"{pid}/{key}": tensor for pid, tensors in clients.items() for key, tensor in tensors.items()}
            self._save_tensors(CLIENTS, local)
        parts = {name: digest for name, digest in self._digests.items() if name != CHECKPOINT}
        if chain := self._read_journal().digests:
            self._sync_journal()
            parts[self._lines] = chain[-1]
        self._replace(RESULT, {**result, "files": parts})
        self._checkpoint.unlink(missing_ok=True)

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
        beside_a_result(self.folder, self._checkpoint)
        return {**result, "run": str(self.folder)}

    def _require_part(self, name: str, digest: str) -> None:
        """Refuse a finished run of which a file is not the one that it has left."""
        readers: Mapping[str, Callable[[Path], str]] = {
            ABOUT: lambda path: digest_of(read_document(path, self.config.hash)),
            self._lines: self._digest_of_journal,
            MODEL: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
            EVALUATED: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
            CLIENTS: lambda path: read_tensors(path, self.config.hash)[1]["digest"],
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
        return chain.digest(len(chain.lines))

    def _save_tensors(self, name: str, tensors: Tensors, about: Mapping[str, str] | None = None) -> None:
        whole = apart(tensors)
        metadata = tensors_metadata(whole, self.config.hash, about)
        with self._replacing(name) as part:
            save_file(whole, part, metadata=metadata)
        self._digests[name] = metadata["digest"]

    def _replace(self, name: str, content: Mapping[str, Any]) -> None:
        document = sealed(content)
        with self._replacing(name) as part:
            part.write_text(json.dumps(document, indent=1), encoding="utf-8")
        self._digests[name] = document["digest"]

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Give a file to write to, and put it in the place of ``name`` once it is whole."""
        try:
            files.is_there(self.folder / name)
        except OSError as error:
            raise RecordError(
                f"Cannot write {self.folder / name}: {reason(error)}. Remove it, then run the same command again."
            ) from error
        with self._writing(f"write {name}"), files.replacing(self.folder / name) as part:
            yield part

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except RecordError:
            raise
        except (OSError, SafetensorError) as error:
            raise RecordError(
                f"Cannot {what} in {self.folder}: {reason(error)}. What was written before is whole. Free some space "
                "or choose another folder with --runs, then run the same command again: it goes on from the checkpoint."
            ) from error


def _of_clients(checkpoint: Checkpoint) -> dict[str, dict[int, Tensors]]:
    """Return what a checkpoint has of each client, by the first part of the keys under which it is written."""
    return {"client": checkpoint.clients, "remembered": checkpoint.remembered, "state": checkpoint.states}
