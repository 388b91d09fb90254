"""Runs one of IREE's worker threads on each core that this process may use.

shortfin asks IREE for the cores of one sysfs "cluster". Where cores share no L2 cache, as on
Intel's servers, that is a single core. There is no option for more, so its call is redirected.
"""

from __future__ import annotations

import ctypes
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sf_local.device.symbol_patch import call_slot

MAX_THREADS = 63  # that an IREE topology can have
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's share of time: "quota period", or "max"

_ASKED = "iree_task_topology_initialize_from_physical_cores"
_Answer = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_size_t,
    ctypes.c_void_p,
)  # fmt: skip


def usable_cores() -> list[int]:
    """One logical CPU of each core that this process may use; not more than its quota pays for."""
    allowed = os.sched_getaffinity(0)
    cores = sorted({min(_siblings(cpu) & allowed) for cpu in allowed})
    return cores[: min(_quota(), MAX_THREADS)]


@contextmanager
def workers_on(library: ctypes.CDLL, path: Path, cores: list[int]) -> Iterator[None]:
    """Give systems that are created inside one worker on each of these logical CPUs.

    library: libshortfin, loaded from `path`.
    """
    cpu_ids = (ctypes.c_uint32 * len(cores))(*cores)
    use = library.iree_task_topology_initialize_from_logical_cpu_set
    use.restype, use.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    answer = _Answer(lambda node, level, spread, most, topology: use(len(cores), cpu_ids, topology))
    slot = call_slot(library, path, _ASKED)
    before = slot.value
    slot.value = ctypes.cast(answer, ctypes.c_void_p).value
    try:
        yield
    finally:
        slot.value = before


def _siblings(cpu: int) -> set[int]:
    """The logical CPUs of a CPU's core, itself included."""
    file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        ranges = [part.split("-") for part in file.read_text().strip().split(",")]
    except OSError:
        return {cpu}
    return {cpu} | {i for ends in ranges for i in range(int(ends[0]), int(ends[-1]) + 1)}


def _quota() -> int:
    """The number of CPUs that a container's quota amounts to."""
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is none, or it is "max"
        return MAX_THREADS


def claim_cpus(count: int) -> list[socket.socket]:
    """Let this thread, and those that it starts, run only on `count` logical CPUs, at least one,
    that no other process of this machine has claimed.

    Cores are taken whole as far as they go. If fewer are free, those are taken; if none is, nothing
    changes. A claim lasts as long as the sockets are open that are returned, or the process lives.
    """
    allowed = os.sched_getaffinity(0)
    claims: dict[int, socket.socket] = {}
    for cpu in sorted(allowed, key=lambda cpu: (min(_siblings(cpu) & allowed), cpu)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sf_local cpu {cpu}")  # a name without a file, which ends with its socket
        except OSError:
            claim.close()
            continue
        claims[cpu] = claim
        if len(claims) >= count:
            break
    if claims:
        os.sched_setaffinity(0, claims)
    return list(claims.values())
