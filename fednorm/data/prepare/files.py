"""The files of a data set wherever they are: in folders, in zip and tar archives, or in both; nothing is unpacked.

Names are as within the archives, with ``/`` between; a file that is there unpacked comes before one in an archive.
Since no member is ever written to the disk under its own name, an archive cannot write anywhere.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fednorm.data.classes import some
from fednorm.data.shards import require_regular
from fednorm.errors import DataError

ZIPPED, TARRED, GZIPPED = (".zip",), (".tar",), (".tar.gz", ".tgz")
ARCHIVES = (*ZIPPED, *TARRED, *GZIPPED)
"""How the names of archives end that are looked into."""

MOST_BYTES = 1 << 28
"""Of one image or list: a file that claims more is no such thing."""

_CHUNK = 1 << 20

Open = Callable[[], IO[bytes]]


class Files:
    """The files of a source: a folder and the archives in it.

    Args:
        source: The folder, or an archive itself.
        archives: The archives to look into.
        scratch: A folder on a disk with room, for what cannot be read in any order (``.tar.gz``).

    Attributes:
        place: The source.
    """

    def __init__(self, source: Path, archives: Sequence[Path], scratch: Path) -> None:
        self.place = source
        self._open: dict[str, Open] = {}
        self._bytes: dict[str, int] = {}
        self._stack = ExitStack()
        with self._stack:
            if source.is_dir():
                self._add_folder(source)
            for path in archives:
                with reading(path):
                    self._add_archive(path, scratch)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        """Return itself; the archives are closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the archives."""
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        return name in self._open

    def __iter__(self) -> Iterator[str]:
        """Yield all names, sorted."""
        return iter(sorted(self._open))

    def read(self, name: str, root: str = "") -> bytes:
        """Return a file's content.

        Raises:
            DataError: It is missing, empty, too large for what it should be, or damaged.
        """
        name = root + name
        if name not in self._open:
            raise DataError(f"{self.place} has no file {name}. Is it all there? Copy or download it again.")
        if self._bytes[name] > MOST_BYTES:
            raise DataError(f"{self.place}: {name} has {self._bytes[name]:,} bytes; no image or list has so many.")
        with reading(self.place / name), self._open[name]() as file:
            content = file.read()
        if not content:
            raise DataError(f"{self.place}: {name} is empty. Copy or download it again.")
        return content

    def text(self, name: str, root: str = "") -> str:
        """Return a file's content as text.

        Raises:
            DataError: As :meth:`read`, or it is no text.
        """
        try:
            return self.read(name, root).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place}: {root + name} is no text in UTF-8. Download it again.") from error

    def lines(self, name: str, root: str = "") -> list[str]:
        """Return a text's lines but for empty ones, without white space at their ends."""
        return [line.strip() for line in self.text(name, root).splitlines() if line.strip()]

    def table(self, name: str, columns: Sequence[str], root: str = "") -> Iterator[tuple[int, list[str]]]:
        """Yield the lines of a list with a head, each with its number, from 2, and what it has in some columns.

        Raises:
            DataError: As :meth:`text`; a column is missing, or a line ends before it.
        """
        lines = csv.DictReader(io.StringIO(self.text(name, root)))
        try:
            if missing := [column for column in columns if column not in (lines.fieldnames or ())]:
                raise DataError(
                    f"{self.place}: {name} has no column {', '.join(missing)}; expected {', '.join(columns)}"
                )
            for line in lines:
                values = [line[column] for column in columns]
                if not all(values):
                    lacks = columns[next(place for place, value in enumerate(values) if not value)]
                    raise DataError(
                        f"{self.place}: {name}, line {lines.line_num} has no {lacks}. Is it all there? Copy or "
                        "download it again"
                    )
                yield lines.line_num, values
        except csv.Error as error:
            raise DataError(f"{self.place}: {name} is no table after line {lines.line_num} ({error})") from error

    @contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file of any size.

        Raises:
            DataError: It is missing or damaged.
        """
        if name not in self._open:
            raise DataError(f"{self.place} has no file {name}. Is it all there? Copy or download it again.")
        with reading(self.place / name), self._open[name]() as file:
            yield file

    def root(self, anchor: str) -> str:
        """Return what stands before a name that ends with ``anchor``: empty, or a folder with ``/`` at its end.

        Of several, the shortest one counts, and of those the first.

        Raises:
            DataError: No file's name ends so.
        """
        roots = [name[: -len(anchor)] for name in self._open if name == anchor or name.endswith(f"/{anchor}")]
        if not roots:
            raise DataError(f"{self.place} has no file {anchor}")
        return min(roots, key=lambda root: (root.count("/"), root))

    def below(self, folder: str) -> list[str]:
        """Return the names in a folder and its folders, sorted, each without the folder's own."""
        return sorted(name[len(folder) :] for name in self._open if name.startswith(folder))

    def there(self) -> str:
        """Return what the source holds, for an error."""
        tops = sorted({name.split("/")[0] for name in self._open})
        return some(tops) or "nothing"

    def _add_folder(self, source: Path) -> None:
        for folder, folders, names in os.walk(source, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                path = Path(folder) / name
                if name.startswith(".") or (path.parent == source and name.lower().endswith(ARCHIVES)):
                    continue
                try:
                    size = path.stat().st_size
                except OSError:  # a link to nothing: an error once it is asked for
                    size = 0
                self._add(path.relative_to(source).as_posix(), size, _opener(path))

    def _add_archive(self, path: Path, scratch: Path) -> None:
        require_regular(path)
        low = path.name.lower()
        if low.endswith(ZIPPED):
            archive = self._stack.enter_context(zipfile.ZipFile(path))
            for member in archive.infolist():
                if not member.is_dir():
                    self._add(member.filename, member.file_size, _zipped(archive, member))
            return
        if low.endswith(GZIPPED):
            path = _gunzipped(path, scratch)
        elif not low.endswith(TARRED):
            raise DataError(f"{path} is no archive that is read; expected one that ends with {', '.join(ARCHIVES)}.")
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.isreg():
                    self._add(entry.name.removeprefix("./"), entry.size, _slice(path, entry.offset_data, entry.size))
                tar.members = []  # type: ignore[attr-defined]  # half a million of them take half a gigabyte

    def _add(self, name: str, size: int, opener: Open) -> None:
        if name not in self._open and not name.startswith("__MACOSX/"):
            self._open[name], self._bytes[name] = opener, size


def md5_of(path: Path) -> str:
    """Return a file's MD5 sum, 32 hex digits: what the authors of data sets publish, and no protection.

    Raises:
        DataError: It cannot be read.
    """
    require_regular(path)
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what fails in reading an archive or a file into an error that names it."""
    try:
        yield
    except DataError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}). Download or copy it again.") from error
    except RuntimeError as error:  # zipfile's, of an encrypted member
        raise DataError(f"{path} cannot be read: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _opener(path: Path) -> Open:
    def open_() -> IO[bytes]:
        require_regular(path)
        return path.open("rb")

    return open_


def _zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Open:
    return lambda: archive.open(member)


def _slice(path: Path, start: int, size: int) -> Open:
    """Return what opens a part of a file; a member of a tar archive is that, and is read by its place."""

    def open_() -> IO[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise EOFError("it ends within a member")
        return io.BytesIO(content)

    return open_


def _gunzipped(path: Path, scratch: Path) -> Path:
    """Return a tar archive out of its gzip, in which nothing can be found without reading all that is before it."""
    target = scratch / f"{path.name}.tar"
    with gzip.open(path) as packed:
        try:
            out = target.open("wb")
        except OSError as error:
            raise _no_room(path, scratch, error) from error
        with out:
            while chunk := packed.read(_CHUNK):
                try:
                    out.write(chunk)
                except OSError as error:
                    raise _no_room(path, scratch, error) from error
    return target


def _no_room(path: Path, scratch: Path, error: OSError) -> DataError:
    free = shutil.disk_usage(scratch).free
    return DataError(
        f"{path} has to be unpacked in {scratch}: {error.strerror} ({free:,} bytes are free). Make room, or choose "
        "another folder."
    )
