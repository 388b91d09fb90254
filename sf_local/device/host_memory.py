"""The host's memory: the machine's, or less where a container's limit is smaller.

Linux ends a process without a word that goes beyond the limit of any cgroup above it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from weakref import WeakSet

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
ROOM = 256 << 20  # bytes that are left to the program: Python, the tokenizer, a step's activations

# Files with the limit and the use in bytes, and the field of memory.stat that tells how much of the
# use is files which Linux drops when it needs room; of version 2, and of version 1
_V2 = "memory.max", "memory.current", "inactive_file"
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def total_bytes() -> int:
    """The machine's memory, or the smallest limit of the cgroups above this process."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _limits())])


def free_bytes() -> int:
    """What this process may allocate now, less ROOM and what is reserved."""
    free = min([_meminfo("MemAvailable"), *(limit - used for limit, used in _limits())])
    with _lock:
        reserved = sum(reservation.num_bytes for reservation in _reservations)
    return max(0, free - ROOM - reserved)


class Reservation:
    """Memory that was allocated here, and that Linux gives only when it is used: as long as this
    object lives, and `num_bytes` of it are not used."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        with _lock:
            _reservations.add(self)


_reservations: WeakSet[Reservation] = WeakSet()
_lock = threading.Lock()


def _forget_reservations() -> None:
    """In a forked child: they are the parent's, as may be the thread that held the lock."""
    global _reservations, _lock
    _reservations, _lock = WeakSet(), threading.Lock()


os.register_at_fork(after_in_child=_forget_reservations)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of the cgroups above this process, as far as they can be read."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Inside a container the path may be the host's, and only the root can be seen
        names = [name for name in PurePosixPath(path).parts if name not in ("/", "..")]
        if controllers == "":
            for mount in (CGROUPS, CGROUPS / "unified"):
                yield from _limits_of(mount, names, *_V2)
        elif "memory" in controllers.split(","):
            yield from _limits_of(CGROUPS / "memory", names, *_V1)


def _limits_of(
    mount: Path, names: list[str], limit: str, use: str, droppable: str
) -> Iterator[tuple[int, int]]:
    for count in range(len(names) + 1):
        folder = mount.joinpath(*names[:count])
        most = _number(folder / limit)  # none is "max"
        if most is not None:
            files = _number(folder / "memory.stat", rf"^{droppable} (\d+)$")
            yield most, (_number(folder / use) or 0) - (files or 0)


def _number(file: Path, pattern: str = r"^(\d+)$") -> int | None:
    """The number in a file of the kernel's; None if there is none, or the file cannot be read."""
    try:
        match = re.search(pattern, file.read_text(), re.M)
    except (OSError, ValueError):
        return None
    return int(match[1]) if match else None


def _meminfo(name: str) -> int:
    kib = _number(MEMINFO, rf"{name}:\s+(\d+) kB")
    return sys.maxsize if kib is None else kib * 1024
