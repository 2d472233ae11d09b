"""What an array would take is said before it is allocated, instead of a process that the system kills."""

from __future__ import annotations

from pathlib import Path

import psutil

from fednorm.errors import ConfigError, FedNormError

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where Linux says what a container may take, and what it has taken."""

_SMALL = 2**28
"""Bytes for which the machine is not even looked at."""


def free_memory() -> int:
    """Return the bytes that this process can still get: of the machine, its container and its own limit."""
    limits = [int(psutil.virtual_memory().available)]
    for limit, used in _GROUPS:
        try:
            left = int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue  # no container, or "max"
        limits.append(max(left, 0))
    if hasattr(psutil, "RLIMIT_AS"):  # Linux
        process = psutil.Process()
        own = int(process.rlimit(psutil.RLIMIT_AS)[0])
        if own != psutil.RLIM_INFINITY:
            limits.append(max(own - int(process.memory_info().vms), 0))
    return min(limits)


def require_memory(needed: int, what: str, remedy: str, error: type[FedNormError] = ConfigError) -> None:
    """Refuse what does not fit into memory.

    Args:
        needed: The bytes it takes.
        what: What it is, with the numbers that make it so large.
        remedy: What to change.
        error: The error that is raised.

    Raises:
        FedNormError: Fewer bytes are free.
    """
    if needed < _SMALL:
        return
    free = free_memory()
    if needed > free:
        raise error(f"{what} would take {_size(needed)} of memory; {_size(free)} are free here. {remedy}")


def _size(count: int) -> str:
    """Return a number of bytes as text, with a unit of 1024s."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    # In whole numbers: what was asked for may be beyond the largest float.
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    tenths = count * 10 >> 10 * power
    if tenths >= 10**9:
        return f"more than {10**8:,} {units[power]}"
    return f"{tenths / 10:,.1f} {units[power]}" if power else f"{count} bytes"
