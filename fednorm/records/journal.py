"""The journal of a record: one line a round or an experience, each chained to those before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import fednorm.records.files as files
from fednorm.errors import RecordError
from fednorm.records.folder import Folder
from fednorm.records.integrity import Chain, chained, read_chain, reason


class Journal:
    """The file of a record that grows while its run goes.

    Args:
        folder: The record's folder.
        name: The file's name.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self.name, self.path, self._folder = name, folder.path / name, folder
        self._chain, self._seen = Chain(), files.NO_FILE  # the file when it was last read or written

    def append(self, line: Mapping[str, Any]) -> None:
        """Append a line; a full disk leaves none of it."""
        chain = self.chain()
        count = len(chain.lines)
        whole = chained(line, count + 1, self._folder.run, chain.digest(count))
        with self._folder.writing(f"append to {self.name}"):
            size = files.append(self.path, json.dumps(whole, allow_nan=False).encode() + b"\n")
            self._seen = files.state(self.path)
        chain.lines.append({key: value for key, value in whole.items() if key not in ("line", "hash", "digest")})
        chain.digests.append(whole["digest"])
        chain.ends.append(size)

    def keep(self, count: int) -> None:
        """Drop the lines after the first ``count``, whole or not.

        Raises:
            RecordError: The lines are another run's.
        """
        chain = self.chain()
        self.require_own(count)
        size = files.state(self.path)[1]
        end = chain.ends[:count][-1] if chain.ends[:count] else 0
        if size == end:
            return
        with self._folder.writing(f"write {self.name}"):
            kept = files.read(self.path)[:end]
        with self._folder.replacing(self.name) as part:
            part.write_bytes(kept if kept.endswith(b"\n") or not kept else kept + b"\n")

    def require_own(self, count: int) -> None:
        """Refuse another run's lines among the first ``count``.

        Raises:
            RecordError: There are some.
        """
        chain = self.chain()
        if chain.foreign and len(chain.lines) <= count:
            raise RecordError(
                f"{self.path} does not belong here: {chain.broken}. Put it back into that run's folder; or remove "
                "it, and the checkpoints beside it where there are any, to start this run over."
            )

    def chain(self) -> Chain:
        """Return the lines that are there, read again if another process has written to the file.

        Raises:
            RecordError: The file cannot be read.
        """
        try:
            state = files.state(self.path)
            if state != self._seen:
                content = files.read(self.path) if state != files.NO_FILE else b""
                self._chain, self._seen = read_chain(content, self._folder.run), state
        except OSError as error:
            raise RecordError(
                f"{self.path} cannot be read: {reason(error)}. Remove it, and the checkpoints beside it, to start "
                "this run over."
            ) from error
        return self._chain

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        with self._folder.writing(f"append to {self.name}"):
            if files.is_there(self.path):
                files.sync(self.path)
