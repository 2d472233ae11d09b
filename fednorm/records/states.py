"""What every client of a large federation keeps, in a table on disk of which a round writes the rows it has changed.

    clients.sqlite      about    the record's format and the hash of its run
                        forms    names, types and shapes of tensors, as JSON; clients mostly share one
                        states   client, ended, form, digest, tensors: what a client keeps from round ``ended`` on
                        points   the rounds of the last checkpoints

It is an SQLite database (measured beside rows in memory-mapped files, which nothing protects from a kill, and beside
its write-ahead log, which leaves more files than one). A client costs nothing before it has trained. A checkpoint is
one transaction: the rows of the clients that have changed since the last one are added, and those that no checkpoint
needs any more are dropped, so that the last checkpoint and the one before it can both be gone on from. A kill leaves
the rows of the checkpoint before, whatever it hits.

Every row has a digest of its run, client, round and content. A checkpoint keeps the sum of the digests of its rows,
which says whether one of them was lost, changed, or is of another attempt.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import fednorm.records.files as files
from fednorm.errors import RecordError
from fednorm.records.folder import Folder, Tensors
from fednorm.records.formats import FORMAT, Unfit
from fednorm.records.integrity import DIGEST_BYTES, require_run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATES = "clients.sqlite"
JOURNAL = f"{STATES}-journal"
"""Where SQLite notes what to take back after a kill; there only while it writes."""

POINTS = 3
"""Checkpoints whose rows are kept: the one being written, the last, and the one before it."""

MOST = 2**62
"""More rounds than any run has."""

_RANGE = 1 << 8 * DIGEST_BYTES
_SCHEMA = """
CREATE TABLE about(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE forms(form INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE states(client INTEGER NOT NULL, ended INTEGER NOT NULL, form INTEGER NOT NULL,
                    digest BLOB NOT NULL, tensors BLOB NOT NULL);
CREATE UNIQUE INDEX states_of_clients ON states(client, ended);
CREATE TABLE points(ended INTEGER PRIMARY KEY);
"""


def tensors_of(folder: Path, run: str) -> Tensors:
    """Return everything that the clients of a record's table keep, as ``CLIENT/PLACE/KEY``; empty without a table.

    Args:
        folder: The record's folder.
        run: The hash of its run.

    Raises:
        RecordError: The table cannot be read.
    """
    table = States(Folder(folder, run))
    try:
        return {f"{client}/{key}": t for client in table.clients() for key, t in table.read(client).items()}
    finally:
        table.close()


class States:
    """The table of what clients keep.

    Args:
        folder: The record's folder; None for a table that is gone with the process, for a run without a record.

    Attributes:
        path: The file; None for none.
    """

    def __init__(self, folder: Folder | None) -> None:
        self._folder = folder
        self.path: Path | None = folder.path / STATES if folder else None
        self._connection: sqlite3.Connection | None = None
        self._forms: dict[str, int] = {}
        self._texts: dict[int, str] = {}
        self._total = 0
        self._changes: dict[int, int] = {}  # of the total, by round, not yet committed
        self._touched: set[int] = set()
        self._failure: Exception | None = None

    @property
    def used(self) -> bool:
        """Whether anything was ever put down in it."""
        return self._connection is not None or self.there

    @property
    def there(self) -> bool:
        """Whether there is a file.

        Raises:
            OSError: Its place holds something else than a regular file.
        """
        return self.path is not None and files.is_there(self.path)

    # What clients keep ------------------------------------------------------------------------------------------------

    def read(self, client: int) -> Tensors:
        """Return what a client keeps; empty for one that keeps nothing.

        Raises:
            RecordError: The table cannot be read, or is damaged. It can then not be written to either, so that a run
                never goes on without something that its clients kept.
        """
        if self._connection is None and not self.there:
            return {}
        with self._guarded("read"):
            row = self._sql(
                "SELECT client, ended, form, digest, tensors FROM states WHERE client = ? ORDER BY ended DESC LIMIT 1",
                client,
            ).fetchone()
            return self._decoded(*row) if row else {}

    def write(self, client: int, ended: int, tensors: Mapping[str, Tensor]) -> None:
        """Put down what a client keeps from a round on; it is on the disk for good with :meth:`commit`.

        Args:
            client: The client.
            ended: The round after which it keeps it.
            tensors: What it keeps, all of it.

        Raises:
            RecordError: The disk is full, or the file cannot be written.
        """
        with self._guarded("write"):
            self._begin()
            form, content = self._encoded(tensors)
            digest = self._digest(client, ended, self._texts[form], content)
            old = self._sql(
                "SELECT digest FROM states WHERE client = ? AND ended <= ? ORDER BY ended DESC LIMIT 1", client, ended
            ).fetchone()
            change = int.from_bytes(digest) - (int.from_bytes(old[0]) if old else 0)
            self._changes[ended] = self._changes.get(ended, 0) + change
            self._sql("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?)", client, ended, form, digest, content)
            self._touched.add(client)

    def clients(self) -> list[int]:
        """Return the clients that keep anything, in order.

        Raises:
            RecordError: The table cannot be read.
        """
        if self._connection is None and not self.there:
            return []
        with self._guarded("read"):
            return [row[0] for row in self._sql("SELECT DISTINCT client FROM states ORDER BY client")]

    def has(self, begin: str) -> bool:
        """Return whether any client keeps a tensor whose name begins so.

        Raises:
            RecordError: The table cannot be read.
        """
        if not self.used:
            return False
        with self._guarded("read"):
            forms = {row[0] for row in self._sql("SELECT DISTINCT form FROM states")}
            return any(key.startswith(begin) for form in forms for key in json.loads(self._texts[form]))

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def commit(self, ended: int) -> str:
        """Put everything up to a round on the disk, and return the digest of what clients keep after it.

        What was put down of later rounds, which did not end, is dropped.

        Raises:
            RecordError: The disk is full, or the file cannot be written; what was there at the last commit is whole.
        """
        with self._guarded("write"):
            self._begin()
            self._sql("INSERT OR IGNORE INTO points VALUES (?)", ended)
            self._sql("DELETE FROM points WHERE ended NOT IN (SELECT ended FROM points ORDER BY ended DESC LIMIT ?)",
                      POINTS)  # fmt: skip
            points = [row[0] for row in self._sql("SELECT ended FROM points")]
            for client in sorted(self._touched):
                self._drop(client, points)
            self._sql("COMMIT")
            self._total += sum(change for of, change in self._changes.items() if of <= ended)
            self._changes, self._touched = {}, set()
        return self._digest_of(self._total)

    def check(self, ended: int, digest: str) -> None:
        """Refuse a table that is not the one that a checkpoint was written with.

        Args:
            ended: The checkpoint's round.
            digest: What :meth:`commit` returned for it.

        Raises:
            Unfit: It is of another run or format.
            ValueError: It is damaged, has lost rows, or is of another attempt.
            OSError: It is missing, or cannot be read.
        """
        if self.verified(ended) != digest:
            self.close()
            raise ValueError("rows of clients are lost in it, or it is of another attempt at this run")

    def verified(self, ended: int = MOST) -> str:
        """Return the digest of what clients keep after a round, every row of it looked at.

        Raises:
            Unfit: It is of another run or format.
            ValueError: It is damaged.
            OSError: It is missing, or cannot be read.
        """
        self.close()
        try:
            if not self.there:
                raise FileNotFoundError(0, "it is missing", str(self.path))
            self._open()
            total, latest = 0, (-1, b"")
            rows = self._sql("SELECT client, ended, form, digest, tensors FROM states WHERE ended <= ? "
                             "ORDER BY client, ended", ended)  # fmt: skip
            with closing(rows):  # a cursor that is not at its end holds a lock
                for client, of, form, own, content in rows:
                    self._require(client, of, self._texts.get(form, ""), own, content)
                    total += int.from_bytes(own) - (int.from_bytes(latest[1]) if client == latest[0] else 0)
                    latest = client, own
        except sqlite3.Error as error:
            self.close()
            raise ValueError(f"SQLite cannot read it: {error}") from error
        except (OSError, ValueError, Unfit):
            self.close()
            raise
        self._total = total
        return self._digest_of(total)

    def keep(self, ended: int) -> None:
        """Drop what was put down after a round; :meth:`check` has been asked.

        Raises:
            RecordError: It cannot be written.
        """
        with self._guarded("write"):
            self._begin()
            self._sql("DELETE FROM states WHERE ended > ?", ended)
            self._sql("DELETE FROM points WHERE ended > ?", ended)
            self._sql("COMMIT")

    def digest(self) -> str:
        """Return the digest of what clients keep at the last commit."""
        return self._digest_of(self._total)

    def remove(self) -> None:
        """Remove the file, or empty the table.

        Raises:
            RecordError: It cannot be removed.
        """
        self.close()
        if self._folder is None or self.path is None:
            return
        with self._folder.writing(f"remove {STATES}"):
            for path in (self.path, self._folder.path / JOURNAL):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file; what was not committed is lost."""
        connection, self._connection = self._connection, None
        self._changes, self._touched, self._forms, self._texts, self._total = {}, set(), {}, {}, 0
        self._failure = None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    # How --------------------------------------------------------------------------------------------------------------

    def _drop(self, client: int, points: list[int]) -> None:
        """Drop the rows of a client that none of the kept checkpoints needs: old ones, and those after the last."""
        rounds = [row[0] for row in self._sql("SELECT ended FROM states WHERE client = ? ORDER BY ended", client)]
        needed = {max((ended for ended in rounds if ended <= point), default=-1) for point in points}
        for ended in rounds:
            if ended not in needed:
                self._sql("DELETE FROM states WHERE client = ? AND ended = ?", client, ended)

    def _sql(self, text: str, *values: object) -> sqlite3.Cursor:
        assert self._connection is not None
        return self._connection.execute(text, values)

    def _begin(self) -> None:
        connection = self._open()
        if not connection.in_transaction:
            connection.execute("BEGIN IMMEDIATE")

    def _open(self) -> sqlite3.Connection:
        """Return the connection to the table, which is made where there is none.

        Raises:
            Unfit: It is of another run or format.
        """
        if self._connection is not None:
            return self._connection
        # Without a file's name SQLite keeps a table of this process's own, in memory and, where it grows, on the disk.
        connection = sqlite3.connect(self.path or "", isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                self._make(connection)
            about = dict(connection.execute("SELECT key, value FROM about"))
            self._require_own(about)
            self._texts = dict(connection.execute("SELECT form, text FROM forms"))
            self._forms = {text: form for form, text in self._texts.items()}
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _require_own(self, about: Mapping[str, str]) -> None:
        if about.get("format") != str(FORMAT):
            raise Unfit(f"it is of format {about.get('format')!r}, and this fednorm reads format {FORMAT}")
        require_run(about.get("hash"), self._run)

    def _make(self, connection: sqlite3.Connection) -> None:
        connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}")
        about = (("format", str(FORMAT)), ("hash", self._run))
        connection.executemany("INSERT INTO about VALUES (?, ?)", about)
        connection.execute("COMMIT")

    @property
    def _run(self) -> str:
        return self._folder.run if self._folder else ""

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """Turn SQLite's errors into ours, and let no later step pass over one that failed.

        Raises:
            RecordError: In place of what went wrong, now or before.
        """
        try:
            if self._failure is not None:
                raise self._failure
            self._open()
            yield
        except RecordError:
            raise
        except (sqlite3.Error, OSError, ValueError, Unfit) as error:
            self._failure = error
            if self._connection is not None and self._connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
            place = f"{STATES} in {self.path.parent}" if self.path else "the temporary table of what clients keep"
            why = f"Cannot {what} {place}: {' '.join(str(error).split()).rstrip('.')}."
            if what == "read":
                raise RecordError(
                    f"{why} If its run has not finished, run the same command again: it goes on from the last "
                    "checkpoint that is whole. If it has, the record has lost its tensors: remove its folder, and make "
                    "the run again."
                ) from error
            raise RecordError(
                f"{why} What the last checkpoint has is whole. Free some space or choose another folder with --runs, "
                "then run the same command again: it goes on from the checkpoint."
            ) from error

    # Rows -------------------------------------------------------------------------------------------------------------

    def _encoded(self, tensors: Mapping[str, Tensor]) -> tuple[int, bytes]:
        """Return the number of the form of some tensors, and their bytes one after the other."""
        import torch

        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}
        form = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in whole.items()}
        text = json.dumps(form, separators=(",", ":"))
        if text not in self._forms:
            number = self._sql("INSERT INTO forms(text) VALUES (?)", text).lastrowid
            self._forms[text], self._texts[int(number or 0)] = int(number or 0), text
        content = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in whole.values())
        return self._forms[text], content

    def _decoded(self, client: int, ended: int, form: int, digest: bytes, content: bytes) -> Tensors:
        """Return what a client keeps, of a row that is what was written.

        Raises:
            ValueError: It is not.
        """
        text = self._texts.get(form, "")
        self._require(client, ended, text, digest, content)
        import torch

        tensors, at = dict[str, torch.Tensor](), 0
        buffer = bytearray(content)  # tensors of memory that cannot be written to make PyTorch warn
        for key, (name, shape) in json.loads(text).items():
            kind: torch.dtype = getattr(torch, name)
            count = torch.Size(shape).numel()
            tensors[key] = (
                torch.frombuffer(buffer, dtype=kind, count=count, offset=at).reshape(shape).clone()
                if count
                else torch.empty(shape, dtype=kind)
            )
            at += count * kind.itemsize
        return tensors

    def _require(self, client: int, ended: int, form: str, digest: bytes, content: bytes) -> None:
        if self._digest(client, ended, form, content) != digest:
            raise ValueError(f"the row of client {client} after round {ended} is not what was written")

    def _digest(self, client: int, ended: int, form: str, content: bytes) -> bytes:
        digest = hashlib.blake2b(f"{self._run}|{client}|{ended}|{form}|".encode(), digest_size=DIGEST_BYTES)
        digest.update(content)
        return digest.digest()

    @staticmethod
    def _digest_of(total: int) -> str:
        return f"{total % _RANGE:0{2 * DIGEST_BYTES}x}"
