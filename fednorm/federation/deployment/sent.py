"""What a site has sent, written down by the site itself before it leaves: nobody need take the server's word for it.

A node whose configuration names a ``sent-file`` appends a line of JSON to it for every message that it answers: which
message, of which round, how many bytes, each tensor's type and shape, every number and text that goes along, and how
many seconds its process has had (Flower starts one a message). A line that cannot be written is an error, and then
nothing is sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from flwr.app import RecordDict

from fednorm.errors import RecordError
from fednorm.federation.wire import nbytes
from fednorm.records.formats import finite


class SentFile:
    """The file in which a site writes down what it sends.

    Args:
        path: The file; it and its folder are made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def answered(self, message: str, content: RecordDict, reply: RecordDict) -> None:
        """Write down a reply.

        Args:
            message: The type of the message that it answers.
            content: What that message held.
            reply: What goes back.

        Raises:
            RecordError: It cannot be written.
        """
        said: dict[str, dict[str, Any]] = {name: dict(record) for name, record in reply.metric_records.items()}
        said |= {name: dict(record) for name, record in reply.config_records.items()}
        said = finite(said)
        tensors = {
            name: {key: [array.dtype, list(array.shape)] for key, array in record.items()}
            for name, record in reply.array_records.items()
        }
        size = sum(nbytes(record.values()) for record in reply.array_records.values()) + len(json.dumps(said).encode())
        self._append(message, content, {"bytes": size, "tensors": tensors, "values": said})

    def failed(self, message: str, content: RecordDict, error: Exception) -> None:
        """Write down that the answer is an error: its class and its text are all that goes back.

        Raises:
            RecordError: It cannot be written.
        """
        text = f"{type(error).__name__}: {error}"
        self._append(message, content, {"bytes": len(text.encode()), "tensors": {}, "values": {}, "error": text})

    def _append(self, message: str, content: RecordDict, entry: dict[str, Any]) -> None:
        config = content.config_records.get("config")
        number = 0 if config is None else int(str(config.get("server-round", 0)))
        line = {"message": message, "round": number, **entry}
        line["process_seconds"] = round(time.time() - psutil.Process().create_time(), 2)
        line["process_cpu_seconds"] = round(time.process_time(), 2)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RecordError(
                f"What the site sends cannot be written down in {self._path}: {error.strerror or error}. Nothing was "
                "sent. Name another file (sent-file in its node-config), or make room there."
            ) from error


@dataclass
class Sent:
    """What a site has sent in answer to one kind of message.

    Attributes:
        count: How many answers.
        size: Their bytes: of tensors' values, and of numbers and texts as JSON.
        tensors: Each tensor's type and shape, by ``RECORD/KEY``.
        values: The names of numbers and texts, by record.
        errors: The errors among the answers.
        seconds: From the start of each answer's process until it was ready, in all.
        cpu_seconds: Of which that process was computing.
    """

    count: int = 0
    size: int = 0
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "answers": self.count,
            "bytes": self.size,
            "tensors": {key: {"dtype": dtype, "shape": list(shape)} for key, (dtype, shape) in self.tensors.items()},
            "values": {name: list(keys) for name, keys in self.values.items()},
            "errors": self.errors,
            "process_seconds": round(self.seconds, 2),
            "process_cpu_seconds": round(self.cpu_seconds, 2),
        }


def read_sent(path: Path) -> dict[str, Sent]:
    """Return what a site has sent, by the type of the message, from its own file.

    Raises:
        RecordError: It is not there, or is none.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return _summed(lines)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} does not say what a site has sent: {error}.") from error


def _summed(lines: Iterable[dict[str, Any]]) -> dict[str, Sent]:
    sent: dict[str, Sent] = {}
    for line in lines:
        of_kind = sent.setdefault(str(line["message"]), Sent())
        of_kind.count += 1
        of_kind.size += int(line["bytes"])
        of_kind.seconds += float(line["process_seconds"])
        of_kind.cpu_seconds += float(line["process_cpu_seconds"])
        for name, arrays in line["tensors"].items():
            of_kind.tensors |= {f"{name}/{key}": (str(d), tuple(shape)) for key, (d, shape) in arrays.items()}
        of_kind.values |= {name: tuple(values) for name, values in line["values"].items()}
        of_kind.errors += [line["error"]] if "error" in line else []
    return sent
