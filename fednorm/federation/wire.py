"""Tensors on Flower's wire, and off it where no wire is needed.

Flower's ``Array`` serializes at once. :class:`MemoryArray` is an ``Array`` that keeps the tensor and serializes only
when somebody asks for its bytes: on our in-process grid nobody does.

What a client sent is decoded by :func:`decode` alone, which knows what it expects and looks before it reads: a header
that does not fit is refused before a byte of its values is touched, and nothing is ever unpickled.

NumPy has no bfloat16, and so Flower's arrays have none: a bfloat16 tensor is serialized as float32, exactly, under the
name ``bfloat16``, and rounded back where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from fednorm.federation.flat import FlatTensors
from fednorm.federation.flower_private import array_record, fill

BFLOAT16 = "bfloat16"

STYPE = "numpy.ndarray"
"""The one serialization that Flower's arrays have."""


class Undecodable(ValueError):
    """Why an array is not the tensor that was expected."""


class MemoryArray(Array):
    """A Flower ``Array`` that holds a tensor and serializes it on demand.

    The tensor is shared with whoever receives the array in this process: neither side may write to it.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Wrap a CPU tensor; it must not be written to afterwards."""
        self.__dict__["tensor"] = tensor

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """Return the type of the values, e.g. ``float32``."""
        return str(self.__dict__["tensor"].dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Return the shape."""
        return tuple(self.__dict__["tensor"].shape)

    @property
    def stype(self) -> str:  # type: ignore[override]
        """Return the serialization that ``data`` has."""
        return STYPE

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Return the serialized array, as Flower's own ``Array`` would hold it."""
        return Array(self.numpy()).data

    def numpy(self) -> NDArray[Any]:
        """Return the tensor as a NumPy array, without a copy; one of bfloat16 as float32."""
        tensor = self.__dict__["tensor"]
        return cast(NDArray[Any], (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain ``Array``."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


# Flower writes an object's class name into its serialized form and looks it up on the other side.
MemoryArray.__qualname__ = Array.__qualname__


class LazyRecord(ArrayRecord):
    """An ``ArrayRecord`` whose arrays are made when they are asked for; it must not be written to."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Take the arrays by key."""
        fill(self, ArrayRecord, arrays)


# Flower writes a record's class name into its serialized form and looks it up on the other side.
LazyRecord.__qualname__ = ArrayRecord.__qualname__


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of tensors that will not be written to again; what is on another device is copied to the CPU."""
    return array_record({key: MemoryArray(_at_rest(tensor)) for key, tensor in tensors.items()})


class _Arrays(Mapping[str, Array]):
    """Tensors as Flower's arrays, each made when it is asked for."""

    def __init__(self, tensors: FlatTensors) -> None:
        self.tensors = tensors

    def __getitem__(self, key: str) -> Array:
        return MemoryArray(self.tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def copy(self) -> dict[str, Array]:
        """Return the arrays by key, as Flower's record asks of what holds its entries."""
        return dict(self)


class FlatRecord(ArrayRecord):
    """A record of tensors that are parts of one vector, as long as nobody puts others in their place."""

    def __init__(self, tensors: FlatTensors) -> None:
        """Take the tensors, which will not be written to again."""
        fill(self, ArrayRecord, _Arrays(tensors))

    @property
    def whole(self) -> FlatTensors | None:
        """The tensors; None where the record has been changed, or is a copy that Flower made."""
        arrays = self.__dict__["_data"]
        return arrays.tensors if isinstance(arrays, _Arrays) else None

    def __setitem__(self, key: str, value: Array) -> None:
        """Put an array in the place of another: from now on the record holds one by one what it held."""
        self._take_apart()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        """Take an array out."""
        self._take_apart()
        super().__delitem__(key)

    def _take_apart(self) -> None:
        self.__dict__["_data"] = dict(self.__dict__["_data"])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain record."""
        return ArrayRecord, (dict(self),)


FlatRecord.__qualname__ = ArrayRecord.__qualname__


def _at_rest(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cpu and not tensor.requires_grad else tensor.detach().cpu()


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record's tensors; they must not be written to."""
    return {key: tensor_of(array) for key, array in record.items()}


def arrays_of(records: RecordDict, name: str) -> ArrayRecord:
    """Return one of our own records of arrays; to sort all records by their types takes longer than to use one."""
    return cast(ArrayRecord, records[name])


def config_of(records: RecordDict) -> ConfigRecord:
    """Return the settings that a message of ours brings."""
    return cast(ConfigRecord, records["config"])


def tensor_of(array: Array) -> Tensor:
    """Return one array of our own as a tensor that must not be written to; for a client's there is :func:`decode`."""
    held = array.__dict__.get("tensor")
    if isinstance(held, Tensor):
        return held
    tensor = torch.from_numpy(np.require(array.numpy(), requirements="W"))
    return tensor.bfloat16() if array.dtype == BFLOAT16 else tensor


def decode(array: Array, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return the tensor that a client sent, if it is one of this shape and type.

    Args:
        array: What came.
        shape: The shape that is expected.
        dtype: The type that is expected, e.g. ``float32``. A bfloat16 tensor may come as float32.

    Returns:
        The tensor, on the CPU; it must not be written to.

    Raises:
        Undecodable: It is something else, in a few words that follow the tensor's name.
    """
    if not isinstance(array, Array):
        raise Undecodable(f"is no Array but a {type(array).__name__}")
    held = array.__dict__.get("tensor")
    if isinstance(held, Tensor):
        if held.dtype is getattr(torch, dtype) and held.shape == shape and held.layout is torch.strided:
            return held.detach() if held.is_cpu else held.detach().cpu()
        _require_fit(tuple(held.shape), str(held.dtype).removeprefix("torch."), shape, dtype)
        if held.layout is not torch.strided:
            raise Undecodable(f"is laid out as {held.layout}; expected a dense tensor")
        tensor = held.detach().cpu()
    else:
        tensor = _from_bytes(array, shape, dtype)
    return tensor.bfloat16() if dtype == BFLOAT16 else tensor


def _require_fit(shape: tuple[int, ...], dtype: str, expected: tuple[int, ...], expected_dtype: str) -> None:
    if shape != expected:
        raise Undecodable(f"has shape {_shown(shape)}; expected {expected}")
    if dtype != expected_dtype and (dtype, expected_dtype) != ("float32", BFLOAT16):
        raise Undecodable(f"is of type {_shown(dtype)}; expected {expected_dtype}")


def _from_bytes(array: Array, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Read the .npy file that a Flower array is, its header first."""
    if array.stype != STYPE:
        raise Undecodable(f"is serialized as {_shown(array.stype)}; expected {STYPE!r}")
    _require_fit(tuple(array.shape), array.dtype, shape, dtype)
    data = array.data
    if not isinstance(data, bytes):
        raise Undecodable(f"holds a {type(data).__name__} in place of bytes")
    numbers, fortran, began = _header(data)
    stored = np.dtype("float32" if dtype == BFLOAT16 else dtype)
    if (numbers[0], numbers[1]) != (shape, stored):
        raise Undecodable(f"says {array.dtype} {shape}, and its bytes hold {_shown(numbers[1])} {_shown(numbers[0])}")
    if (came := len(data) - began) != (size := stored.itemsize * math.prod(shape)):
        raise Undecodable(f"has {came} bytes of values; expected {size}: it was cut short or damaged")
    flat = np.frombuffer(data, stored, offset=began).copy()  # bytes cannot be written to, which PyTorch warns of
    return torch.from_numpy(flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape))


def _header(data: bytes) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], bool, int]:
    """Return a .npy file's shape and type, whether it is in Fortran's order, and where its values begin."""
    stream = BytesIO(data)
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except Exception as error:  # a header is a stranger's text, and NumPy's reader may fail on it in any way
        raise Undecodable("cannot be decoded: its bytes are no NumPy array") from error
    return (shape, dtype), fortran, stream.tell()


def _shown(value: object) -> str:
    """Return what came as text for an error: short, on one line."""
    text = value if isinstance(value, str) else repr(value)
    text = ascii(text)[1:-1] if not text.isprintable() else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def nbytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of the arrays' values in their own types, without the few bytes of each header."""
    return sum(_nbytes(array) for array in arrays)


def _nbytes(array: Array) -> int:
    held = array.__dict__.get("tensor")
    if isinstance(held, Tensor):
        return held.nbytes
    size = 2 if array.dtype == BFLOAT16 else np.dtype(array.dtype).itemsize
    return size * math.prod(array.shape)
