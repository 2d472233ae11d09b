"""Federated runs: Flower apps, strategies' common base, and our in-process runtime.

The package has the name of the function :func:`fednorm.federated`, and Python binds it to that name when a module of it
is first imported. So the package can be called, and a call is the function's.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, **arguments: Any) -> dict[str, Any]:
        """Run a federation in this process: :func:`fednorm.api.federated`."""
        from fednorm.api import federated

        return federated(**arguments)


sys.modules[__name__].__class__ = _Package
