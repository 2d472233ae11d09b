"""A record's folder as what writes to it sees it: files replaced whole, sealed, and errors that say what stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetensors import SafetensorError

import fednorm.records.files as files
from fednorm.errors import RecordError
from fednorm.records.integrity import apart, reason, sealed, tensors_metadata

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"


class Folder:
    """Where a record's files are written.

    Attributes:
        path: The folder.
        run: The hash of the run, which every file carries.
        digests: Of the files that this process has written, by name.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.digests: dict[str, str] = {}

    def save_tensors(self, name: str, tensors: Tensors, about: Mapping[str, str] | None = None) -> None:
        """Replace a file of tensors.

        Args:
            name: The file's name.
            tensors: What it will hold.
            about: What else its metadata tell.

        Raises:
            RecordError: It cannot be written; what was there is whole.
        """
        with self.replacing(name) as part:
            metadata = self.write_tensors(part, tensors, about)
        self.digests[name] = metadata["digest"]

    def write_tensors(self, path: Path, tensors: Tensors, about: Mapping[str, str] | None = None) -> dict[str, str]:
        """Write tensors to a file that :meth:`replacing` gave, and return the metadata they were given."""
        from safetensors.torch import save_file  # imports PyTorch, which reading a record does without

        whole = apart(tensors)
        metadata = tensors_metadata(whole, self.run, about)
        save_file(whole, path, metadata=metadata)
        return metadata

    def replace(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a file of keys.

        Raises:
            RecordError: It cannot be written; what was there is whole.
        """
        document = sealed(content)
        with self.replacing(name) as part:
            part.write_text(json.dumps(document, indent=1), encoding="utf-8")
        self.digests[name] = document["digest"]

    @contextmanager
    def replacing(self, name: str, keep: str | None = None) -> Iterator[Path]:
        """Give a file to write to, and put it in the place of ``name`` once it is whole.

        Args:
            name: The file to be replaced or made.
            keep: The name that what it replaces is kept under; None to lose it.

        Raises:
            RecordError: It cannot be written; what was there is whole.
        """
        try:
            files.is_there(self.path / name)
        except OSError as error:
            raise RecordError(
                f"Cannot write {self.path / name}: {reason(error)}. Remove it, then run the same command again."
            ) from error
        kept = None if keep is None else self.path / keep
        with self.writing(f"write {name}"), files.replacing(self.path / name, keep=kept) as part:
            yield part

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Say what could not be done to the folder, and what to do.

        Raises:
            RecordError: In place of the system's errors.
        """
        try:
            yield
        except RecordError:
            raise
        except (OSError, SafetensorError) as error:
            raise RecordError(
                f"Cannot {what} in {self.path}: {reason(error)}. What was written before is whole. Free some space "
                "or choose another folder with --runs, then run the same command again: it goes on from the checkpoint."
            ) from error
