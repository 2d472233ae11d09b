"""Tensors on Flower's wire, and off it where no wire is needed.

Flower's ``Array`` serializes at once. :class:`MemoryArray` is an ``Array`` that keeps the tensor and serializes only
when somebody asks for its bytes: on our in-process grid nobody does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor


class MemoryArray(Array):
    """A Flower ``Array`` that holds a tensor and serializes it on demand.

    The tensor is shared with whoever receives the array in this process: neither side may write to it.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Wrap a CPU tensor; it must not be written to afterwards."""
        fields = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": tuple(tensor.shape),
            "stype": "numpy.ndarray",
            "tensor": tensor,
        }
        self.__dict__.update(fields)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Return the serialized array, as Flower's own ``Array`` would hold it."""
        return Array(self.numpy()).data

    def numpy(self) -> NDArray[Any]:
        """Return the tensor as a NumPy array, without a copy."""
        return cast(NDArray[Any], self.__dict__["tensor"].numpy())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain ``Array``."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


# Flower writes an object's class name into its serialized form and looks it up on the other side.
MemoryArray.__qualname__ = Array.__qualname__


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of tensors that will not be written to again."""
    record = ArrayRecord()
    for key, tensor in tensors.items():
        record[key] = MemoryArray(tensor.detach())
    return record


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record's tensors; they must not be written to."""
    return {key: tensor_of(array) for key, array in record.items()}


def tensor_of(array: Array) -> Tensor:
    """Return one array as a tensor that must not be written to."""
    held = array.__dict__.get("tensor")
    return held if isinstance(held, Tensor) else torch.from_numpy(np.require(array.numpy(), requirements="W"))


def nbytes(arrays: Iterable[Array]) -> int:
    """Return the bytes of the arrays' values, without the few bytes of each header."""
    return sum(_nbytes(array) for array in arrays)


def _nbytes(array: Array) -> int:
    held = array.__dict__.get("tensor")
    return held.nbytes if isinstance(held, Tensor) else np.dtype(array.dtype).itemsize * math.prod(array.shape)
