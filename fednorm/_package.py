"""Packages that can be called, because a public function has their name.

``fednorm.federated`` is both a package and the function :func:`fednorm.api.federated`, and Python binds the package to
that name when a module of it is first imported. So the package can be called, and a call is the function's.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose call is that of the function of its name in :mod:`fednorm.api`."""

    def __call__(self, **arguments: Any) -> dict[str, Any]:
        """Call the function."""
        import fednorm.api

        result: dict[str, Any] = getattr(fednorm.api, self.__name__.rpartition(".")[2])(**arguments)
        return result


def make_callable(package: str) -> None:
    """Make an imported package callable."""
    sys.modules[package].__class__ = CallablePackage
