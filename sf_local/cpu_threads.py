"""Which cores IREE's worker threads run on: all that this process may use, one thread each.

shortfin asks IREE for the cores of one sysfs "cluster". Where cores share no L2 cache, as on
Intel's servers, that is a single core. There is no option for more, so the call is redirected.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

MAX_THREADS = 63  # of an IREE topology
QUOTA = Path("/sys/fs/cgroup/cpu.max")

_ASKED = b"iree_task_topology_initialize_from_physical_cores"
_RELOCATIONS, _FOR_A_SECTION = 4, 0x40  # SHT_RELA, SHF_INFO_LINK: those of .rela.plt
_Answer = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_size_t,
    ctypes.c_void_p,
)  # fmt: skip


class _Section(NamedTuple):
    """A section header of a 64-bit ELF file."""

    name: int
    kind: int
    flags: int
    address: int
    at: int
    length: int
    link: int
    info: int
    alignment: int
    entry: int


def usable_cores() -> list[int]:
    """One logical CPU of each core that this process may use, as far as its share of time goes."""
    allowed = os.sched_getaffinity(0)
    cores = sorted({min(_siblings(cpu) & allowed) for cpu in allowed})
    return cores[: min(_quota(), MAX_THREADS)]


@contextmanager
def workers_on(library: ctypes.CDLL, path: Path, cores: list[int]) -> Iterator[None]:
    """Systems that are created inside have one worker on each of these cores.

    library: libshortfin, loaded from `path`.
    """
    cpu_ids = (ctypes.c_uint32 * len(cores))(*cores)
    use = library.iree_task_topology_initialize_from_logical_cpu_set
    use.restype, use.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    answer = _Answer(lambda node, level, spread, most, topology: use(len(cores), cpu_ids, topology))
    here = ctypes.cast(getattr(library, _ASKED.decode()), ctypes.c_void_p).value or 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
        symbol_at, slot_at = _addresses(elf, _ASKED)
    slot = ctypes.c_void_p.from_address(here - symbol_at + slot_at)
    before = slot.value
    slot.value = ctypes.cast(answer, ctypes.c_void_p).value
    try:
        yield
    finally:
        slot.value = before


def _siblings(cpu: int) -> set[int]:
    """The logical CPUs of its core."""
    file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        ranges = [part.split("-") for part in file.read_text().strip().split(",")]
    except OSError:
        return {cpu}
    return {cpu} | {i for ends in ranges for i in range(int(ends[0]), int(ends[-1]) + 1)}


def _quota() -> int:
    """CPUs that a container's quota amounts to."""
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # none, or "max"
        return MAX_THREADS


def _addresses(elf: bytes | mmap.mmap, name: bytes) -> tuple[int, int]:
    """Where a library has an exported function, and the slot that its own calls go through."""
    [table_at] = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [_Section(*struct.unpack_from("<IIQQQQIIQQ", elf, table_at + i * size))
                for i in range(count)]  # fmt: skip
    [jumps] = [s for s in sections if s.kind == _RELOCATIONS and s.flags & _FOR_A_SECTION]
    symbols = sections[jumps.link]
    names_at = sections[symbols.link].at
    for at in range(jumps.at, jumps.at + jumps.length, jumps.entry):
        slot, info = struct.unpack_from("<QQ", elf, at)
        name_at, _, _, _, value = struct.unpack_from(
            "<IBBHQ", elf, symbols.at + (info >> 32) * symbols.entry
        )
        start = names_at + name_at
        if elf[start : start + len(name) + 1] == name + b"\0":
            return value, slot
    raise LookupError(f"libshortfin does not call {name.decode()}")
