"""One thread a process for every test: the last bits of sums depend on it, and two busy processes share the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
