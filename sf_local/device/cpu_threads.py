"""How many of IREE's worker threads compute on the CPU, and on which CPUs they may run.

shortfin asks IREE for a worker on each core of one sysfs "cluster", and IREE binds it to that core.
Where cores share no L2 cache, as on Intel's servers, a cluster is a single core; and a worker that
is bound waits while another process has its core, even if others are idle. There is no option for
anything else, so the call is redirected.
"""

from __future__ import annotations

import ctypes
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sf_local.device.symbol_patch import call_slot

MAX_THREADS = 63  # that an IREE topology can have
SLICE = 500_000  # ns that a thread runs for before others do; by default 1 to 3 ms
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's share of time: "quota period", or "max"

_SCHED_SETATTR, _SCHED_GETATTR = 314, 315  # system calls on x86-64
_ASKED = "iree_task_topology_initialize_from_physical_cores"
_BINDS = "iree_thread_request_affinity"
_Answer = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_size_t,
    ctypes.c_void_p,
)  # fmt: skip


def usable_cores() -> set[int]:
    """One logical CPU of each core that this thread may use."""
    allowed = os.sched_getaffinity(0)
    return {min(_siblings(cpu) & allowed) for cpu in allowed}


def num_usable_cores() -> int:
    """How many cores this thread may use; not more than its process's quota pays for."""
    return min(len(usable_cores()), _quota(), MAX_THREADS)


@contextmanager
def worker_threads(library: ctypes.CDLL, path: Path, count: int) -> Iterator[None]:
    """Give systems that this thread creates in the `with` block `count` workers. These run on any
    of its `usable_cores`, and so never two on one core while others are idle.

    library: libshortfin, loaded from `path`.
    """
    use = library.iree_task_topology_initialize_from_group_count
    use.restype, use.argtypes = None, [ctypes.c_size_t, ctypes.c_void_p]
    answer = _Answer(lambda node, level, spread, most, topology: use(count, topology))
    # IREE would let workers run on all CPUs, whatever this process may use. Each asks for that once
    # more when it begins to run, so what does nothing in its place stays there.
    call_slot(library, path, _BINDS).value = _address(ctypes.CDLL(None).getpid)
    slot = call_slot(library, path, _ASKED)
    before = slot.value
    allowed, cores = os.sched_getaffinity(0), usable_cores()
    slot.value = _address(answer)
    try:
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, cores)  # which threads have that are started meanwhile
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)
        slot.value = before


def _address(function: Any) -> int | None:
    """Where a function of C is."""
    return ctypes.cast(function, ctypes.c_void_p).value


def ask_for_short_slices() -> None:
    """Let this thread, and those that it starts, run sooner after they wake up, for SLICE at a
    time. Their share of the CPU stays the same.

    Threads that compute together wait for the last of them: beside other processes, the sooner
    each runs again the better. Linux before 6.12 ignores this; threads of another policy than
    SCHED_OTHER are left alone.
    """
    libc, attributes = ctypes.CDLL(None), _Attributes()
    size = ctypes.sizeof(attributes)
    failed = libc.syscall(_SCHED_GETATTR, 0, ctypes.byref(attributes), size, 0)
    if not failed and attributes.policy == os.SCHED_OTHER:
        attributes.runtime = SLICE
        libc.syscall(_SCHED_SETATTR, 0, ctypes.byref(attributes), 0)


class _Attributes(ctypes.Structure):
    """Linux's struct sched_attr."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    )  # fmt: skip


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
