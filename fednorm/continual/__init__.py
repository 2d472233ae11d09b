"""Continual runs: streams of experiences, the learners' common base, and what is measured on them."""

from __future__ import annotations

from fednorm._package import make_callable

make_callable(__name__)
