"""A run's record on disk: what was run, what happened in every round, where it can go on, and what came out.

    RUNS/fedbn-batch_norm-digits-seed1-0123456789ab/
        run.json                  the resolved configuration, its hash, versions, the plan, the data's title and notes
        rounds.jsonl              one line a round: every client's metrics
        checkpoint.safetensors    the server's tensors, its optimizer's, every client's; the round; while it runs
        model.safetensors         the final server tensors
        clients.safetensors       every client's final local tensors, as client/key; where the strategy keeps any
        result.json               the result; there once the run has finished

Files are replaced whole, never half. Lines of rounds after the checkpoint are dropped on resume: those rounds are run
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

Tensors = dict[str, Tensor]

CHECKPOINT = "checkpoint.safetensors"

NEEDED = frozenset({"hash", "config", "data", "rounds", "final", "evaluation", "seconds"})
"""Keys without which no table can be made of a result."""


@dataclass
class Checkpoint:
    """Where a run can go on.

    Attributes:
        server_round: The last finished round.
        server: The server's tensors after it.
        strategy: The strategy's own tensors.
        clients: Each client's local tensors, by partition id.
    """

    server_round: int
    server: Tensors
    strategy: Tensors = field(default_factory=dict)
    clients: dict[int, Tensors] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("fednorm", "torch", "torchvision", "numpy", "flwr", "scikit-learn", "matplotlib", "pillow"):
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
        name = f"{config.strategy.name}-{config.norm.name}-{config.data.name}-seed{config.seed}-{config.hash}"
        self.folder = Path(root).absolute() / name
        self.config = config
        self._checkpoint = self.folder / CHECKPOINT

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

    def append_round(self, line: Mapping[str, Any]) -> None:
        """Append one round's line to ``rounds.jsonl``."""
        with (
            self._writing("append to rounds.jsonl"),
            (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line) + "\n")

    def rounds(self) -> list[dict[str, Any]]:
        """Return the rounds' lines; a line cut short by a kill is left out."""
        path = self.folder / "rounds.jsonl"
        lines = []
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        tensors = {f"server/{key}": tensor for key, tensor in checkpoint.server.items()}
        tensors |= {f"strategy/{key}": tensor for key, tensor in checkpoint.strategy.items()}
        for partition_id, local in checkpoint.clients.items():
            tensors |= {f"client/{partition_id}/{key}": tensor for key, tensor in local.items()}
        self._save_tensors(CHECKPOINT, tensors, {"round": str(checkpoint.server_round)})

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint, and drop the lines of later rounds; None where there is none.

        Raises:
            RecordError: The file is damaged.
        """
        path = self._checkpoint
        if not path.exists():
            self.drop_rounds()
            return None
        checkpoint = Checkpoint(0, {})
        try:
            with safe_open(path, framework="pt") as file:
                checkpoint.server_round = int(file.metadata()["round"])
                for key in file.keys():  # noqa: SIM118 - a safetensors handle is no dictionary
                    place, name = key.split("/", 1)
                    tensor = file.get_tensor(key)
                    if place == "client":
                        partition_id, name = name.split("/", 1)
                        checkpoint.clients.setdefault(int(partition_id), {})[name] = tensor
                    else:
                        (checkpoint.server if place == "server" else checkpoint.strategy)[name] = tensor
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RecordError(
                f"The checkpoint {path} is damaged ({error}). Remove the file to start this run over."
            ) from error
        self.drop_rounds(after=checkpoint.server_round)
        if (found := len(self.rounds())) != checkpoint.server_round:
            raise RecordError(
                f"{self.folder / 'rounds.jsonl'} has the lines of {found} rounds, and the checkpoint beside it was "
                f"written after round {checkpoint.server_round}. Remove {path} to start this run over."
            )
        return checkpoint

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
        self.drop_rounds()

    def drop_rounds(self, after: int = 0) -> None:
        """Drop the lines of the rounds after ``after``, and a line cut short by a kill."""
        kept = [line for line in self.rounds() if line["round"] <= after]
        self._replace("rounds.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def finish(self, result: Mapping[str, Any], server: Tensors, clients: Mapping[int, Tensors]) -> None:
        """Write the final tensors and the result, and remove the checkpoint: the run has finished.

        Args:
            result: The result.
            server: The server's tensors.
            clients: Each client's local tensors, by partition id.
        """
        self._save_tensors("model.safetensors", server, {"hash": self.config.hash})
        if clients:
            local = {f"{pid}/{key}": tensor for pid, tensors in clients.items() for key, tensor in tensors.items()}
            self._save_tensors("clients.safetensors", local, {"hash": self.config.hash})
        self._replace("result.json", json.dumps(result, indent=1))
        self._checkpoint.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, or None.

        Raises:
            RecordError: The file is damaged.
        """
        path = self.folder / "result.json"
        return {**read_result(path), "run": str(self.folder)} if path.exists() else None

    def _save_tensors(self, name: str, tensors: Tensors, metadata: dict[str, str]) -> None:
        with self._replacing(name) as part:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part, metadata=metadata)

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


def read_result(path: Path) -> dict[str, Any]:
    """Return a file of results: a run's ``result.json``, or summaries of several under ``results``.

    Raises:
        RecordError: The file cannot be read, or is no JSON document of that kind.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not a result: {error}.") from error
    results = document.get("results", [document]) if isinstance(document, dict) else None
    if not isinstance(results, list) or not all(isinstance(r, dict) and r.keys() >= NEEDED for r in results):
        raise RecordError(
            f"{path} is not a result: it needs the keys {', '.join(sorted(NEEDED))}. Give a record's folder, a folder "
            "of records, or a summary that 'fednorm report --summary' wrote; where a result.json is damaged, remove "
            "it, and the run is made again."
        )
    return dict(document)
