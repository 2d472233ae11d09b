"""What a recorded trace is, and what a family of traces must say to be replayed."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fednorm.errors import DataError

SINGLE_RTOL, SINGLE_ATOL = 1e-5, 1e-6
"""The same of what was recorded in single precision."""
RTOL = 1e-9
"""Largest relative error of a replay in float64, as the traces' authors recommend."""
ATOL = 1e-11
"""Largest absolute error of a replay in float64, on top of the relative one."""


@dataclass(frozen=True)
class Trace:
    """The contents of one trace file.

    Attributes:
        hparams: The hyper-parameters it was recorded with.
        arrays: Every array by its key, ``hparams`` and ``source`` excepted.
    """

    hparams: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]

    def tensor(self, key: str) -> Tensor:
        """Return an array as a new tensor of its own type.

        Raises:
            DataError: There is no such array.
        """
        if key not in self.arrays:
            raise DataError(f"the trace has no array {key!r}")
        return torch.from_numpy(np.array(self.arrays[key]))

    def optional(self, key: str) -> Tensor | None:
        """Return an array as a new tensor, or None where there is none."""
        return self.tensor(key) if key in self.arrays else None

    def setting(self, *path: str) -> Any:
        """Return a hyper-parameter by its path.

        Raises:
            DataError: There is no such hyper-parameter.
        """
        value: Any = self.hparams
        for name in path:
            if not isinstance(value, Mapping) or name not in value:
                raise DataError(f"the trace's hparams lack {'.'.join(path)!r}")
            value = value[name]
        return value

    def cases(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the name and settings of each case, for the traces that hold several layers side by side."""
        for name, settings in self.hparams.items():
            if isinstance(settings, Mapping):
                yield name, settings

    def names(self, prefix: str) -> list[str]:
        """Return what follows ``prefix`` in the keys that begin with it, in the file's order."""
        return [key.removeprefix(prefix) for key in self.arrays if key.startswith(prefix)]


@dataclass(frozen=True)
class Comparison:
    """A value we computed beside the value that was recorded.

    Attributes:
        key: The recorded array's key.
        ours: What fednorm computed.
        recorded: What the official implementation computed.
        exact: Whether no rounding is involved, so that both must be equal.
        single: Whether it was recorded in single precision, and we computed so.
    """

    key: str
    ours: Tensor
    recorded: Tensor
    exact: bool = False
    single: bool = False

    @property
    def error(self) -> float:
        """Return the largest absolute difference; infinite where shapes differ or a value is not finite."""
        if self.ours.shape != self.recorded.shape:
            return float("inf")
        if not self.recorded.numel():
            return 0.0
        difference = (self.ours.double() - self.recorded.double()).abs().max().item()
        return difference if difference == difference else float("inf")

    def within(self, rtol: float, atol: float) -> bool:
        """Return whether |ours - recorded| <= atol + rtol * |recorded| everywhere, or equality where it must be."""
        if self.exact:
            return torch.equal(self.ours, self.recorded)
        if self.single:
            rtol, atol = SINGLE_RTOL, SINGLE_ATOL
        return self.ours.shape == self.recorded.shape and torch.allclose(
            self.ours.double(), self.recorded.double(), rtol=rtol, atol=atol
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """The traces of one kind, and how to replay them with fednorm's own classes.

    Attributes:
        method: The method they test, in fednorm's words.
        matches: Whether a file is of this kind, from its hyper-parameters and keys and never from its name.
        replay: Computes everything the trace recorded.
        rtol: Largest relative error.
        atol: Largest absolute error on top of it.
        note: What a reader of a passed replay must know: what was left out, and why. Empty for most.
    """

    method: str
    matches: Callable[[Trace], bool]
    replay: Callable[[Trace], Iterable[Comparison]]
    rtol: float = RTOL
    atol: float = ATOL
    note: Callable[[Trace], str] = lambda _: ""


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        DataError: It is missing, damaged, not a NumPy archive, or without hyper-parameters.
    """
    arrays = _arrays(path)
    arrays.pop("source", None)
    try:
        hparams = json.loads(str(arrays.pop("hparams")))
    except KeyError as error:
        raise DataError("no hparams: not a trace") from error
    except json.JSONDecodeError as error:
        raise DataError(f"hparams are not JSON ({error})") from error
    if not isinstance(hparams, dict):
        raise DataError(f"hparams must be a JSON object; got {type(hparams).__name__}")
    return Trace(hparams, arrays)


def _arrays(path: Path) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    try:
        # Opened here, because numpy leaves the file open when the archive in it is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                return {key: archive[key] for key in archive.files}
    except (OSError, EOFError, KeyError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"not a readable .npz archive of plain arrays ({error})") from error
    raise DataError("a single NumPy array, not an .npz archive")
