"""Data moved to a device: each array once, whoever shares it."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def moved(data: T, device: torch.device) -> T:
    """Return data on a device: a federation, a stream, a split, or any dataclass that holds tensors.

    Every tensor and every part is moved once, so that what is one object before is one after. Data that are there
    already, as on the CPU, are returned as they are.

    Args:
        data: Dataclasses, tuples and tensors in one another; anything else stays as it is.
        device: The device.
    """
    result: T = _Move(device)(data)
    return result


class _Move:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._done: dict[int, tuple[Any, Any]] = {}  # with the original, so that no other object gets its id

    def __call__(self, value: Any) -> Any:
        if id(value) not in self._done:
            self._done[id(value)] = value, self._moved(value)
        return self._done[id(value)][1]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device)
        if type(value) is tuple:
            parts = tuple(map(self, value))
            return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in own.items() if (new := self(old)) is not old}
        return dataclasses.replace(value, **changed) if changed else value
