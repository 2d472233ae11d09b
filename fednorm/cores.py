"""How many cores this process may use, and how they are shared among what runs at the same time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
"""Where Linux says how much of the cores a container may use: microseconds, and in how many; ``max`` for all."""


def available_cores() -> int:
    """Return the number of cores that this process may run on; those of the machine where the system does not say."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cores() -> int:
    """Return the number of cores that can be kept busy: those available, less what a container's limit takes away."""
    cores = available_cores()
    try:
        quota, period = CPU_LIMIT.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit
        return cores


class Cores(NamedTuple):
    """The cores of one run.

    Attributes:
        all: Those that can be kept busy.
        share: The run's share of them, where others run at the same time.
    """

    all: int
    share: int


_among = 1


def share_cores(among: int) -> None:
    """Let the runs of this process have one part in so many of the cores: others have the rest."""
    global _among  # a process's, as its cores are
    _among = among


def cores_of_a_run() -> Cores:
    """Return how many cores a run of this process may keep busy; one at least."""
    count = usable_cores()
    return Cores(count, max(1, count // _among))
