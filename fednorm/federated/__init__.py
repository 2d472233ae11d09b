"""Federated runs: Flower apps, strategies' common base, and our in-process runtime."""

from __future__ import annotations

from fednorm._package import make_callable

make_callable(__name__)
