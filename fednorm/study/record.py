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

Files are replaced whole, never half. Lines written after the checkpoint are dropped on resume: what they tell of is run
again, to the same numbers.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fednorm.config import RunConfig
from fednorm.errors import RecordError
from fednorm.study.formats import Unfit, migrated

Tensors = dict[str, Tensor]

CHECKPOINT = "checkpoint.safetensors"

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
        data: The digest of the data it was trained on; None in a checkpoint that does not say.
    """

    server_round: int
    server: Tensors
    strategy: Tensors = field(default_factory=dict)
    clients: dict[int, Tensors] = field(default_factory=dict)
    data: str | None = None


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in (
        "fednorm",
        "torch",
        "torchvision",
        "numpy",
        "flwr",
        "avalanche-lib",
        "scikit-learn",
        "matplotlib",
        "pillow",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


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
        self.prepare()
        with self._writing("lock the record"):
            handle = (self.folder / ".lock").open("w")
        with handle:
            with self._writing("lock the record"):
                self._lock(handle)
            yield

    def _lock(self, handle: TextIO) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordError(
                f"Another process is running this run now ({self.folder}). Wait for it, or end it; then call again."
            ) from error

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        document = {"config": self.config.to_dict(), "hash": self.config.hash, "versions": versions(), **about}
        self._replace("run.json", json.dumps(document, indent=1))

    def append_line(self, line: Mapping[str, Any]) -> None:
        """Append the line of a round or an experience."""
        with (
            self._writing(f"append to {self._lines}"),
            (self.folder / self._lines).open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the rounds or experiences; a line cut short by a kill is left out."""
        path = self.folder / self._lines
        lines = []
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def keep_lines(self, count: int) -> None:
        """Drop the lines after the first ``count``, and a line cut short by a kill."""
        kept = self.lines()[:count]
        self._replace(self._lines, "".join(json.dumps(line) + "\n" for line in kept))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        tensors = {f"server/{key}": tensor for key, tensor in checkpoint.server.items()}
        tensors |= {f"strategy/{key}": tensor for key, tensor in checkpoint.strategy.items()}
        for partition_id, local in checkpoint.clients.items():
            tensors |= {f"client/{partition_id}/{key}": tensor for key, tensor in local.items()}
        told = {} if checkpoint.data is None else {"data": checkpoint.data}
        self._save_checkpoint(tensors, {"round": str(checkpoint.server_round), **told})

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint, and drop the lines of later rounds; None where there is none.

        Raises:
            RecordError: The file is damaged, or a tensor is missing or of another shape than was written.
        """
        if not self._checkpoint.exists():
            self.keep_lines(0)
            return None
        with self.restoring():
            tensors, told = self._read_checkpoint()
            checkpoint = Checkpoint(int(told["round"]), {}, data=told.get("data"))
            for key, tensor in tensors.items():
                place, name = key.split("/", 1)
                if place == "client":
                    partition_id, name = name.split("/", 1)
                    checkpoint.clients.setdefault(int(partition_id), {})[name] = tensor
                else:
                    (checkpoint.server if place == "server" else checkpoint.strategy)[name] = tensor
        self._require_lines(checkpoint.server_round, "round")
        return checkpoint

    def save_state(self, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint of a continual run.

        Args:
            tensors: The learner's tensors.
            state: What else it needs, for JSON; ``experiences``, how many have ended, among it.
        """
        document = json.dumps({"version": CHECKPOINT_VERSION, **state})
        self._save_checkpoint(tensors, {"state": document})

    def load_state(self) -> tuple[Tensors, dict[str, Any]] | None:
        """Return what :meth:`save_state` wrote, and drop the lines of later experiences; None where there is none.

        Raises:
            RecordError: The file is damaged, a tensor is missing or of another shape than was written, or the file is
                of another version of fednorm.
        """
        if not self._checkpoint.exists():
            self.keep_lines(0)
            return None
        with self.restoring():
            tensors, told = self._read_checkpoint()
            state = json.loads(told["state"])
            version_found, ended = state["version"], int(state["experiences"])
        if version_found != CHECKPOINT_VERSION:
            raise RecordError(
                f"The checkpoint {self._checkpoint} has version {version_found}, and this fednorm reads "
                f"{CHECKPOINT_VERSION}. Go on with the fednorm that wrote it, or remove the file to start this run "
                "over."
            )
        self._require_lines(ended, "experience")
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
        except (SafetensorError, RecordError, LookupError, TypeError, ValueError, RuntimeError) as error:
            how = "cannot be gone on from" if isinstance(error, RecordError) else "is damaged"
            reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise RecordError(
                f"The checkpoint {self._checkpoint} {how} ({reason}). Remove the file to start this run over."
            ) from error

    def _save_checkpoint(self, tensors: Tensors, told: Mapping[str, str]) -> None:
        shapes = json.dumps({key: list(tensor.shape) for key, tensor in tensors.items()})
        self._save_tensors(CHECKPOINT, tensors, {**told, "shapes": shapes})

    def _read_checkpoint(self) -> tuple[Tensors, dict[str, str]]:
        """Return the checkpoint's tensors and what it tells besides."""
        with safe_open(self._checkpoint, framework="pt") as file:
            told: dict[str, str] = dict(file.metadata())
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        for key, shape in json.loads(told.get("shapes", "{}")).items():
            if tuple(tensors[key].shape) != tuple(shape):
                raise ValueError(f"{key} was written in shape {tuple(shape)} and has {tuple(tensors[key].shape)}")
        return tensors, told

    def _require_lines(self, count: int, what: str) -> None:
        """Drop what was written after the checkpoint, and refuse a record that has lost what came before it."""
        self.keep_lines(count)
        if (found := len(self.lines())) != count:
            raise RecordError(
                f"{self.folder / self._lines} has the lines of {found} {what}s, and the checkpoint beside it was "
                f"written after {what} {count}. Remove {self._checkpoint} to start this run over."
            )

    def start_over(self) -> None:
        """Forget the rounds of an earlier attempt that left no checkpoint.

        Raises:
            RecordError: There is a checkpoint, which is not lost for a runtime that cannot use it.
        """
        if self._checkpoint.exists():
            raise RecordError(
                f"This run was begun in process, and Flower's runtime cannot go on from its checkpoint. Go on with "
                f"--runtime in-process, choose another folder with --runs, or remove {self._checkpoint}."
            )
        self.keep_lines(0)

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
            self._save_tensors("evaluated.safetensors", evaluated, {"hash": self.config.hash})
        self._save_tensors("model.safetensors", model, {"hash": self.config.hash})
        if clients:
            local = {f"{pid}/{key}": tensor for pid, tensors in clients.items() for key, tensor in tensors.items()}
            self._save_tensors("clients.safetensors", local, {"hash": self.config.hash})
        self._replace("result.json", json.dumps(result, indent=1))
        self._checkpoint.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None.

        Raises:
            RecordError: The file is damaged, or of a newer version of fednorm.
        """
        path = self.folder / "result.json"
        if not path.exists():
            return None
        try:
            result = migrated(json.loads(path.read_text(encoding="utf-8")), self.folder)
        except (OSError, ValueError, RecursionError, Unfit) as error:
            raise RecordError(
                f"{path} is not a result: {str(error).rstrip('.')}. Remove it, and the run is made again."
            ) from error
        return {**result, "run": str(self.folder)}

    def _save_tensors(self, name: str, tensors: Tensors, metadata: dict[str, str]) -> None:
        with self._replacing(name) as part:
            save_file(_apart(tensors), part, metadata=metadata)

    def _replace(self, name: str, text: str) -> None:
        with self._replacing(name) as part:
            part.write_text(text, encoding="utf-8")

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Give a file to write to, and put it in the place of ``name`` once it is whole."""
        part = self.folder / f"{name}.part"
        with self._writing(f"write {name}"):
            try:
                yield part
                os.replace(part, self.folder / name)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except RecordError:
            raise
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecordError(
                f"Cannot {what} in {self.folder}: {reason}. What was written before is whole. Free some space or "
                "choose another folder with --runs, then run the same command again: it goes on from the checkpoint."
            ) from error


def _apart(tensors: Tensors) -> Tensors:
    """Return contiguous tensors of which no two share memory: a network may have one parameter in two places."""
    places, apart = set[int](), Tensors()
    for key, tensor in tensors.items():
        whole = tensor.contiguous()
        apart[key] = whole.clone() if whole.untyped_storage().data_ptr() in places else whole
        places.add(whole.untyped_storage().data_ptr())
    return apart
