"""A layer that needs to be told its tasks says once where nobody does."""

from __future__ import annotations

import warnings
import weakref
from typing import Any


class _Said:
    """Whether it was said of the layers of one method object; shared by them, and by copies of them."""

    def __init__(self) -> None:
        self.done = False

    def __deepcopy__(self, memo: Any) -> _Said:
        return self


_SAID: dict[int, tuple[weakref.ref[Any], _Said]] = {}


class Hearing:
    """What a layer knows of being told its tasks.

    Args:
        norm: The method object that made the layer; its layers warn once together. None for a layer by itself.

    Attributes:
        told: Whether the layer has been told, or has said that it was not.
    """

    def __init__(self, norm: Any = None) -> None:
        self.told = False
        self._said = _Said() if norm is None else _said_of(norm)

    def say(self, name: str) -> None:
        """Warn that a training pass is made and nobody has told the tasks."""
        self.told = True
        if self._said.done:
            return
        self._said.done = True
        warnings.warn(
            f"{name} was never told the tasks of its samples, and takes all for one. Train with fednorm's learners, "
            "put fednorm.avalanche.NormPlugin() among the plugins of Avalanche's strategy, or call set_tasks(tasks, "
            "num_tasks) on the layers before each training pass (set_tasks(None, 1) if one task is meant).",
            UserWarning,
            stacklevel=3,
        )


def _said_of(norm: Any) -> _Said:
    """Return what the layers of a method object share; by identity, since equal objects may be of two networks."""
    key = id(norm)
    if key not in _SAID:
        _SAID[key] = weakref.ref(norm, lambda _: _SAID.pop(key, None)), _Said()
    return _SAID[key][1]
