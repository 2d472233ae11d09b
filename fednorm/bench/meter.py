"""What a run costs: processor time, wall-clock time and memory, of this process or of the processes it starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from torch import Tensor

from fednorm.federation.workbench import Workbench


@dataclass(frozen=True, eq=False)
class Cost:
    """What one run of one engine cost.

    Attributes:
        startup_cpu: Processor seconds from the start to the end of the first round.
        startup_wall: Wall-clock seconds of the same.
        cpu: Processor seconds of each round after the first.
        wall: Wall-clock seconds of the same.
        memory: The most memory of all its processes together, in bytes; what they share is counted once.
        tensors: The server's final tensors.
    """

    startup_cpu: float
    startup_wall: float
    cpu: tuple[float, ...]
    wall: tuple[float, ...]
    memory: int
    tensors: Mapping[str, Tensor]


def cost(wall: Sequence[float], cpu: Sequence[float], memory: int, tensors: Mapping[str, Tensor]) -> Cost:
    """Return the cost from what the clocks showed at the start and at the end of each round, in seconds."""
    wall_seconds, cpu_seconds = np.diff(wall).tolist(), np.diff(cpu).tolist()
    return Cost(cpu_seconds[0], wall_seconds[0], tuple(cpu_seconds[1:]), tuple(wall_seconds[1:]), memory, tensors)


class RoundClock:
    """Reads both clocks of this process when made, and at the end of each round; an Observer of a run.

    Args:
        workers: Count the processor time of this process's children too; the system counts it in hundredths of a
            second.

    Attributes:
        wall: The wall clock's readings, in seconds.
        cpu: The processor clock's readings, of all threads.
    """

    def __init__(self, *, workers: bool = False) -> None:
        self._workers = psutil.Process() if workers else None
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.tick()

    def tick(self) -> None:
        """Read the clocks."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time() + (_cpu_of_children(self._workers) if self._workers else 0.0))

    def begin(self, bench: Workbench, first_round: int) -> None:
        """Do nothing: what goes before the first round is part of the start."""

    def round(self, line: Mapping[str, Any]) -> None:  # noqa: ARG002 - an Observer's method
        """Read the clocks."""
        self.tick()


def _cpu_of_children(process: psutil.Process) -> float:
    """Return the processor seconds of the children that a process has, and of those that it has had."""
    own = process.cpu_times()
    spent: float = own.children_user + own.children_system
    for child in process.children():
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        spent += times.user + times.system
    return spent


class ProcessWatch:
    """Watches processes from a thread, at intervals, while a block runs.

    A descendant is found by its parents and remembered, so that its time still counts when it ends or is adopted by
    another; what it used after the last look at it is not seen.

    Args:
        descendants: Watch what this process starts from now on, instead of this process itself.
        itself: Watch this process too.
    """

    INTERVAL = 0.2
    """Seconds between two looks."""

    def __init__(self, *, descendants: bool, itself: bool = False) -> None:
        self._self = psutil.Process()
        self._descendants, self._itself = descendants, itself or not descendants
        self._strangers = set(self._self.children(recursive=True)) if descendants else set()
        self._cpu_of: dict[psutil.Process, float] = {}
        self._times: list[float] = []
        self._cpu: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.memory = 0

    def __enter__(self) -> ProcessWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    @property
    def started(self) -> float:
        """Return when the block began, in seconds since the epoch."""
        return self._times[0]

    def cpu_at(self, times: Sequence[float]) -> list[float]:
        """Return the processor seconds used up to each time (since the epoch), between two looks by interpolation."""
        return [float(seconds) for seconds in np.interp(times, self._times, self._cpu)]

    def _watch(self) -> None:
        while not self._done.wait(self.INTERVAL):
            self._look()

    def _look(self) -> None:
        found = self._self.children(recursive=True) if self._descendants else []
        found += [self._self] if self._itself else []
        memory = 0
        for process in {*found, *self._cpu_of} - self._strangers:
            try:
                spent, held = process.cpu_times(), _memory_of(process)
            except psutil.Error:
                continue
            self._cpu_of[process] = spent.user + spent.system
            memory += held
        self.memory = max(self.memory, memory)
        self._times.append(time.time())
        self._cpu.append(sum(self._cpu_of.values()))


def _memory_of(process: psutil.Process) -> int:
    """Return a process's memory in bytes; of what several have, its part alone, where the system says (Linux)."""
    part = getattr(process.memory_full_info(), "pss", None)
    return int(process.memory_info().rss if part is None else part)
