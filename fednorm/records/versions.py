"""The versions that a run's numbers may depend on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in (
        "fednorm",
        "torch",
        "torchvision",
        "numpy",
        "flwr",
        "avalanche-lib",
        "scikit-learn",
        "matplotlib",
        "pillow",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
