"""HugeWeights: a CPU's weights, moved from the pages of their files to pages of 2 MiB."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sf_local.device.host_memory import Reservation, free_bytes

HUGE = 2 << 20
MAX_FAULTS = 256  # of copying so much: 1 where it gets a huge page, 512 in pages of 4 KiB
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAILED = ctypes.c_void_p(-1).value  # what mmap and mremap return then
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MREMAP_MAYMOVE_FIXED = 1 | 2

_libc = ctypes.CDLL(None)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [*[ctypes.c_void_p] + [ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = _libc.madvise.argtypes = [*_libc.munmap.argtypes, ctypes.c_int]


class HugeWeights:
    """Moves mapped files to huge pages, in a thread, while they are read.

    A step reads all weights once, and to look up where each page of 4 KiB lies took a fifth to a
    third of a decode step in a virtual machine. How large the pages of a file are is up to its file
    system. So each 2 MiB are copied to a huge page, which then takes the place of the original:
    mremap does that at once for whoever reads meanwhile. Intel's iodlr and node's
    --use-largepages move program text in this way.

    Processes share the pages of a file, and Linux drops them when it needs room; neither holds of
    copies. So there are copies only where as much memory as they take stays free beside them.
    """

    def __init__(self) -> None:
        self._mapped: list[range] = []  # addresses
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def note(self, path: Path, load: Callable[[], None]) -> None:
        """Call a function that maps a file, and note where it did."""
        with _lock:  # others may map the same file
            before = set(_mappings(path))
            load()
            self._mapped += [new for new in _mappings(path) if new not in before]

    def start(self) -> None:
        """Begin, unless that was done before."""
        if self._mapped and self._thread is None:
            self._thread = threading.Thread(
                target=self._move_all, name="sf_local-huge-pages", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # no thread is left
                self._mapped = []

    def close(self) -> None:
        """End, before the files are unmapped."""
        self._is_closing = True
        if self._thread is not None and self._mapped:
            self._thread.join()

    def _move_all(self) -> None:
        with contextlib.suppress(OSError):  # of this thread alone: requests go first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        wholes = [_whole_pages(mapped) for mapped in self._mapped]
        num_bytes = sum(len(whole) for whole in wholes)
        if _are_forbidden() or free_bytes() < 2 * num_bytes:
            return
        reservation = Reservation(num_bytes)
        for whole in wholes:
            self._move(whole, reservation)

    def _move(self, whole: range, reservation: Reservation) -> None:
        """Move what lies in whole huge pages, until this closes or Linux has no more of them."""
        if (copy := _allocate(len(whole))) is None:
            return
        end = copy + len(whole)
        for address in range(whole.start, whole.stop, HUGE):
            if self._is_closing or not _fill_huge_page(copy, address):
                break
            _libc.mprotect(copy, HUGE, mmap.PROT_READ)
            if _libc.mremap(copy, HUGE, HUGE, MREMAP_MAYMOVE_FIXED, address) == FAILED:
                break
            copy += HUGE
            reservation.num_bytes -= HUGE
        if copy < end:  # other addresses may be another's by now
            _libc.munmap(copy, end - copy)


def _allocate(num_bytes: int) -> int | None:
    """The address of new memory for huge pages; None if there is none."""
    size = num_bytes + HUGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if not num_bytes or (found := _libc.mmap(None, size, PROT_READ_WRITE, flags, -1, 0)) == FAILED:
        return None
    start = _whole_pages(range(found, found + size)).start
    for spare in (range(found, start), range(start + num_bytes, found + size)):
        if spare:
            _libc.munmap(spare.start, len(spare))
    _libc.madvise(start, num_bytes, mmap.MADV_HUGEPAGE)
    return start


def _fill_huge_page(address: int, source: int) -> bool:
    """Copy 2 MiB to new memory; whether Linux gave a huge page for it."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    ctypes.memmove(address, source, HUGE)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < MAX_FAULTS


def _whole_pages(addresses: range) -> range:
    """The huge pages that lie in a range of addresses."""
    start = -(-addresses.start // HUGE) * HUGE
    return range(start, max(start, addresses.stop // HUGE * HUGE))


def _are_forbidden() -> bool:
    try:
        return "[never]" in ENABLED.read_text()
    except OSError:
        return True


def _mappings(path: Path) -> Iterator[range]:
    """Addresses at which this process has mapped a file, by the kernel's list."""
    name = str(path.resolve()).replace("\n", r"\012")
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, path
        if len(fields) == 6 and fields[5] == name:
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            yield range(start, stop)


_lock = threading.Lock()


def _forget_lock() -> None:
    """In a forked child: the thread that held it may be the parent's."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
