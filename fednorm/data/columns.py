"""One Parquet file of images: its image, label and domain columns, whatever Arrow type they are stored as."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from fednorm.data.classes import Rows, in_natural_order, some
from fednorm.data.images import decode
from fednorm.data.shards import DOMAIN_COLUMN, IMAGE_COLUMNS, LABEL_COLUMNS, require_regular
from fednorm.errors import DataError
from fednorm.memory import require_memory

_IMAGE_FEATURE, _CLASS_FEATURE = "Image", "ClassLabel"
_MOST_BATCH_ROWS = 512
_BATCH_BYTES = 64 << 20
_LONGEST_NAME = 200


class ImageTable:
    """One Parquet file; every error of reading it names it.

    Attributes:
        path: The file.
        num_rows: The number of its rows, as its footer says; columns of another length are refused.
        class_names: The class names in its metadata, or nothing.
    """

    def __init__(self, path: Path) -> None:
        require_regular(path)
        self.path = path
        with self._file() as file:
            self._schema: pa.Schema = file.schema_arrow
            self.num_rows = int(file.metadata.num_rows)
            self._bytes = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        self._features = self._read_features()
        self._image = self._find(IMAGE_COLUMNS, "image", _IMAGE_FEATURE)
        self._label = self._find(LABEL_COLUMNS, "label", _CLASS_FEATURE)
        self._check_image_type()
        self.class_names = self._names_of(self._label)

    def labels(self) -> tuple[Rows, tuple[str, ...]]:
        """Return the labels and the names of their classes; none where labels are numbers without names.

        Raises:
            DataError: A label is missing, negative, beyond the named classes, or neither a whole number nor a text.
        """
        column = self._column(self._label)
        self._refuse_nulls(column, "the label is missing. Remove the row or give it a label")
        if _is_text(column.type):
            return self._spelled(column)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int64())
        if not pa.types.is_integer(column.type):
            raise DataError(
                f"{self.path}: column {self._label!r} must hold integers 0 to K - 1 or the classes' names as text; it "
                f"is {_short(column.type)}. Store one such value a row."
            )
        numbers = column.to_numpy()
        most = len(self.class_names) or np.iinfo(np.int64).max
        outside = np.flatnonzero((numbers < 0) | (numbers >= most))
        if len(outside):
            row = int(outside[0])
            names = len(self.class_names)
            highest = f"{names - 1} (the metadata names {names} classes)" if names else "K - 1"
            hidden = (
                " It stands for a label that is kept secret: take a split with labels." if numbers[row] == -1 else ""
            )
            raise DataError(f"{self.path}, row {row}: label {numbers[row]} is outside 0 to {highest}.{hidden}")
        return numbers.astype(np.int64), self.class_names

    def domains(self) -> npt.NDArray[np.str_] | None:
        """Return each row's domain as text, or None where the file has no such column.

        Raises:
            DataError: A domain is missing, none of the named ones, or neither a text nor a whole number.
        """
        if DOMAIN_COLUMN not in self._schema.names:
            return None
        column = self._column(DOMAIN_COLUMN)
        self._refuse_nulls(column, "domain None is none of a name. Remove the row or name its domain")
        if not (_is_text(column.type) or pa.types.is_integer(column.type)):
            raise DataError(
                f"{self.path}: column {DOMAIN_COLUMN!r} must hold the domains' names as text, or whole numbers; it is "
                f"{_short(column.type)}. Store one such value a row, or drop the column."
            )
        values, codes = self._distinct(column)
        return np.array([self._domain_name(value, column) for value in values] or [""], dtype=np.str_)[codes]

    def images(self) -> Iterator[Image.Image]:
        """Yield the images in order, mode ``RGB`` (:func:`fednorm.data.images.decode`)."""
        row = 0
        size = max(1, min(_MOST_BATCH_ROWS, _BATCH_BYTES * self.num_rows // max(self._bytes, 1)))
        with self._file() as file:
            for batch in file.iter_batches(size, columns=[self._image]):
                contents = batch.column(0)
                if pa.types.is_struct(contents.type):
                    contents = contents.field("bytes")
                for content in contents.to_pylist():
                    yield self._decode(content, row)
                    row += 1
        if row != self.num_rows:
            raise self._other_length(row)

    def _decode(self, content: bytes | None, row: int) -> Image.Image:
        if content is None:
            raise DataError(
                f"{self.path}, row {row}: the image's bytes are missing. Embed the image files in the Parquet file "
                "(Hugging Face: `embed_external_files=True`)."
            )
        return decode(content, f"{self.path}, row {row}")

    def _other_length(self, length: int) -> DataError:
        return DataError(
            f"{self.path} announces {self.num_rows} rows and holds {length}. It is corrupt: copy it again."
        )

    def _file(self) -> AbstractContextManager[pq.ParquetFile]:
        return _opened(self.path)

    def _find(self, candidates: Sequence[str], what: str, feature: str) -> str:
        """Return the column of a known name, else the only one whose metadata declare it to be one."""
        names: list[str] = self._schema.names
        declared = [name for name in names if _type_of(self._features.get(name)) == feature and name != DOMAIN_COLUMN]
        name = next((name for name in candidates if name in names), declared[0] if len(declared) == 1 else None)
        if name is None:
            other = next((n for n in names if n.lower() in candidates), declared[0] if declared else "COLUMN")
            raise DataError(
                f"{self.path} has no {what} column: expected {' or '.join(candidates)}, found "
                f"{some(names) or 'no column'}. Rename it: table.rename_columns({{{other!r}: {candidates[0]!r}}})."
            )
        if names.count(name) > 1:
            raise DataError(f"{self.path} has {names.count(name)} columns named {name!r}. Rename or drop all but one.")
        return name

    def _check_image_type(self) -> None:
        kind = self._schema.field(self._image).type
        whole = kind
        if pa.types.is_struct(kind):
            at = kind.get_field_index("bytes")
            kind = kind.field(at).type if at >= 0 else None
        if kind is None or not _is_bytes(kind):
            raise DataError(
                f"{self.path}: column {self._image!r} must be a struct with a field 'bytes' that holds a whole image "
                f"file (Hugging Face's Image type), or such bytes themselves; it is {_short(whole)}. Encode each image "
                "as PNG."
            )

    def _column(self, name: str) -> pa.ChunkedArray:
        """Return a column, decoded where it is stored as a dictionary, of the length that the footer says."""
        if self._schema.names.count(name) > 1:
            raise DataError(f"{self.path} has several columns named {name!r}. Rename or drop all but one.")
        require_memory(
            24 * self.num_rows,
            f"Column {name!r} of {self.path}, {self.num_rows:,} rows,",
            "Is the file whole? Split a data set of that size.",
            DataError,
        )
        with self._file() as file:
            column = file.read(columns=[name]).column(name)
            if len(column) != self.num_rows:
                raise self._other_length(len(column))
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            # Views have fewer kernels than the types of the same values.
            return column.cast(pa.large_string()) if _is_text(column.type) else column

    def _refuse_nulls(self, column: pa.ChunkedArray, reason: str) -> None:
        if column.null_count:
            row = pc.index(column.is_null(), value=True).as_py()
            raise DataError(f"{self.path}, row {row}: {reason}.")

    def _distinct(self, column: pa.ChunkedArray) -> tuple[list[Any], Rows]:
        """Return the distinct values of a column and each row's place among them."""
        with _named(self.path):
            values = pc.unique(column)
            codes: Rows = pc.index_in(column, value_set=values).to_numpy().astype(np.int64)
            return values.to_pylist(), codes

    def _spelled(self, column: pa.ChunkedArray) -> tuple[Rows, tuple[str, ...]]:
        values, codes = self._distinct(column)
        names = self.class_names or in_natural_order(values)
        number = {name: k for k, name in enumerate(names)}
        unknown = next((value for value in values if value not in number), None)
        if unknown is not None:
            row = pc.index(column, value=unknown).as_py()
            raise DataError(f"{self.path}, row {row}: label {unknown!r} is none of the named classes: {some(names)}.")
        return np.array([number[value] for value in values], dtype=np.int64)[codes], names

    def _domain_name(self, value: Any, column: pa.ChunkedArray) -> str:
        names = self._names_of(DOMAIN_COLUMN)
        name = str(value)
        if names and not isinstance(value, str):
            name = names[value] if 0 <= value < len(names) else ""
        if (names and name not in names) or not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            row = pc.index(column, value=value).as_py()
            shown = repr(value if len(str(value)) <= _LONGEST_NAME else f"{str(value)[:20]}...")
            expected = some(names) if names else f"a name of 1 to {_LONGEST_NAME} printable characters"
            raise DataError(f"{self.path}, row {row}: domain {shown} is none of {expected}.")
        return name

    def _read_features(self) -> dict[str, Any]:
        """Return the Hugging Face feature types in the schema's metadata, or nothing."""
        text = (self._schema.metadata or {}).get(b"huggingface")
        if text is None:
            return {}
        try:
            value = json.loads(text)
            for key in ("info", "features"):
                value = value.get(key, {})
            return dict(value.items())
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{self.path}: the metadata 'huggingface' of its schema, which would name the classes, cannot be read "
                f"({str(error)[:100]}); expected JSON {{'info': {{'features': {{COLUMN: TYPE}}}}}}. Write it again, or "
                "drop it with table.replace_schema_metadata(None)."
            ) from error

    def _names_of(self, column: str) -> tuple[str, ...]:
        """Return the class names that the metadata give a column, or nothing."""
        feature = self._features.get(column)
        names = feature.get("names") if isinstance(feature, dict) else None
        if names is None:
            return ()
        if not (isinstance(names, list) and all(isinstance(name, str | int) for name in names)):
            raise DataError(
                f"{self.path}: the names of column {column!r} in its metadata are {str(names)[:60]}; expected a list "
                "of texts. Write them again."
            )
        distinct = tuple(str(name) for name in names)
        twice = (
            sorted({name for name in distinct if distinct.count(name) > 1}) if len(set(distinct)) < len(names) else []
        )
        if twice:
            raise DataError(f"{self.path} names class {some(twice, repr)} of column {column!r} twice. Rename one.")
        return distinct


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the many errors of reading a Parquet file into one that names it."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if error.errno is None:  # pyarrow's word for a damaged file
            raise _broken(path, error) from error
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (pa.ArrowException, ValueError, TypeError, LookupError, MemoryError, OverflowError) as error:
        raise _broken(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    with _named(path), pa.OSFile(str(path), "rb") as source, pq.ParquetFile(source) as file:
        yield file


def _broken(path: Path, error: Exception) -> DataError:
    try:
        with path.open("rb") as file:
            pointer = file.read(32).startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    if pointer:
        return DataError(f"{path} is a pointer of Git LFS, not the file. Get the file: git lfs pull.")
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return DataError(f"{path} cannot be read as a Parquet file ({reason}). It is corrupt or incomplete: copy it again.")


def _type_of(feature: Any) -> Any:
    return feature.get("_type") if isinstance(feature, dict) else None


def _one_of(*names: str) -> Callable[[pa.DataType], bool]:
    tests = [getattr(pa.types, f"is_{name}") for name in names if hasattr(pa.types, f"is_{name}")]

    def test(kind: pa.DataType) -> bool:
        return any(test(kind) for test in tests)

    return test


# pyarrow 16 has no views.
_is_text = _one_of("string", "large_string", "string_view")
_is_bytes = _one_of("binary", "large_binary", "binary_view", "fixed_size_binary")


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 80 else f"{text[:80]}..."
