"""HugeWeights: a CPU's weights, moved from the pages of their files to pages of 2 MiB."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from sf_local.device.host_memory import Reservation, free_bytes

HUGE = 2 << 20
CHECKED = 32 << 20  # bytes that are copied between two looks at what is free
MOVER = "sf_local-pages"  # the name of the thread that moves weights
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAILED = ctypes.c_void_p(-1).value  # what mmap and mremap return then
PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
MREMAP_MAYMOVE_FIXED = 1 | 2

_libc = ctypes.CDLL(None)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
]  # fmt: skip
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = _libc.madvise.argtypes = [*_libc.munmap.argtypes, ctypes.c_int]
_libc.mincore.argtypes = [*_libc.munmap.argtypes, ctypes.c_void_p]


class HugeWeights:
    """Moves mapped files to huge pages, in a thread, while they are read.

    A step reads all weights once, and in a virtual machine decode was 1.2 to 2.3 times as fast in
    huge pages as in those of the file: 4 KiB each, or as its file system likes. So each 2 MiB are
    copied to a huge page, which then takes the place of the original: mremap does that at once for
    whoever reads meanwhile. Intel's iodlr and node's --use-largepages move program text in this
    way.

    Processes share the pages of a file, and Linux drops them when it needs room; neither holds of
    copies. So copying ends where less memory than the weights take would stay free.
    """

    def __init__(self) -> None:
        self._wholes: list[range] = []  # addresses of whole huge pages in mapped files
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def note(self, path: Path, load: Callable[[], None]) -> None:
        """Call a function that maps a file, and note where it did.

        All who map weights do it here, in turn, so that none takes another's for its own.
        """
        with _lock:
            before = _mappings(path)
            load()
            new = _mappings(path) - before
        if len(new) == 1 and (whole := _whole_pages(*new)):
            self._wholes.append(whole)

    def start(self) -> None:
        """Begin, unless that was done before."""
        if self._wholes and self._thread is None:
            thread = threading.Thread(target=self._move_all, name=MOVER, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                self._wholes = []
            else:
                self._thread = thread

    def close(self) -> None:
        """End, before the files are unmapped."""
        self._is_closing = True
        if self._thread is not None:
            self._thread.join()

    def _move_all(self) -> None:
        os.nice(10)  # only this thread: requests go first
        if _are_forbidden():
            return
        num_bytes = sum(len(whole) for whole in self._wholes)
        reservation = Reservation(num_bytes)
        for whole in self._wholes:
            self._move(whole, reservation, num_bytes)

    def _move(self, whole: range, reservation: Reservation, room: int) -> None:
        """Move some whole pages, until this closes, Linux has no huge page, or less than `room`
        would stay free."""
        if (copy := _allocate(len(whole))) is None:
            return
        end = copy + len(whole)
        for address in range(whole.start, whole.stop, HUGE):
            if (address - whole.start) % CHECKED == 0 and free_bytes() < room:
                break
            if self._is_closing or not _get_huge_page(copy):
                break
            ctypes.memmove(copy, address, HUGE)
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
    if (found := _libc.mmap(None, size, PROT_READ_WRITE, flags, -1, 0)) == FAILED:
        return None
    start = _whole_pages(range(found, found + size)).start
    for spare in (range(found, start), range(start + num_bytes, found + size)):
        if spare:
            _libc.munmap(spare.start, len(spare))
    _libc.madvise(start, num_bytes, mmap.MADV_HUGEPAGE)
    return int(start)


def _get_huge_page(address: int) -> bool:
    """Write to new memory; whether all of a huge page is there then."""
    ctypes.memset(address, 0, 1)
    is_there = (ctypes.c_ubyte * (HUGE // mmap.PAGESIZE))()
    return _libc.mincore(address, HUGE, is_there) == 0 and all(is_there)


def _whole_pages(addresses: range) -> range:
    """The huge pages that lie in a range of addresses."""
    start = -(-addresses.start // HUGE) * HUGE
    return range(start, max(start, addresses.stop // HUGE * HUGE))


def _are_forbidden() -> bool:
    """Whether this Linux has no transparent huge pages, or was told to give none."""
    try:
        return "[never]" in ENABLED.read_text()
    except OSError:
        return True


def _mappings(path: Path) -> set[range]:
    """Addresses at which this process has mapped the whole of a file, by the kernel's list."""
    try:
        name = os.fsencode(path.resolve()).replace(b"\n", rb"\012")
        size = -(-path.stat().st_size // mmap.PAGESIZE) * mmap.PAGESIZE
        lines = Path("/proc/self/maps").read_bytes().split(b"\n")
    except OSError:
        return set()
    found = set()
    for line in lines:
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, path
        if len(fields) == 6 and fields[5] == name and int(fields[2], 16) == 0:
            start, stop = (int(address, 16) for address in fields[0].split(b"-"))
            if stop - start == size:
                found.add(range(start, stop))
    return found


_lock = threading.Lock()


def _forget_lock() -> None:
    """In a forked child: the thread that held it may be the parent's."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
