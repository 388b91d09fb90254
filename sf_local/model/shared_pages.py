"""SharedPages: KV pages in the host's memory, which take as much of it as is used."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from sf_local.device.host_memory import Reservation
from sf_local.model.huge_weights import HUGE

AHEAD = 64 << 20  # bytes to ask for at most before they are used


class SharedPages:
    """Bytes of pages, uint8 [num_pages, page_bytes].

    Linux gives memory to what is written for the first time, in transparent huge pages of 2 MiB
    where it can, as page faults took a tenth of the time of a prefill. So it may have given, and
    keep when some of it is given back, up to that much around what is used. What it has not given
    yet is reserved, so that it does not count as free.

    In a virtual machine whose host must find memory first, 2 MiB took 4.5 ms. So an engine that has
    waited for work for a moment asks for the memory of the pages that are begun next.
    """

    def __init__(self, pages: NDArray[np.uint8]) -> None:
        self._pages, self._has_memory = pages, np.zeros(len(pages), np.bool_)
        self._reservation = Reservation(pages.nbytes)
        self._num_begun = 0  # pages, since `ask_ahead` last returned False
        self._advise(0, len(pages), mmap.MADV_HUGEPAGE)

    def clear(self, pages: Sequence[int]) -> None:
        """Zero some pages, while the device does nothing."""
        self._num_begun += len(pages)
        self._write(pages)

    def ask_ahead(self, free: Iterable[int]) -> bool:
        """Have memory for some of the `free` pages, which are begun in this order: about 2 MiB of
        it, or a page. False if there is enough for as many pages as were begun since the last
        False, or AHEAD bytes."""
        page_bytes = self._pages.shape[1]
        soon = np.fromiter(islice(free, min(self._num_begun, AHEAD // page_bytes)), np.intp)
        missing = soon[~self._has_memory[soon]][: max(1, HUGE // page_bytes)]
        if not len(missing):
            self._num_begun = 0
            return False
        self._write(missing.tolist())
        return True

    def _write(self, pages: Sequence[int]) -> None:
        self._pages[list(pages)] = 0
        self.use(pages)

    def use(self, pages: Sequence[int], has_memory: bool = True) -> None:
        """Note that some pages are written, or have no memory any more."""
        self._has_memory[list(pages)] = has_memory
        num_unused = len(self._pages) - np.count_nonzero(self._has_memory)
        self._reservation.num_bytes = int(num_unused) * self._pages.shape[1]

    def give_back(self, pages: Sequence[int]) -> None:
        """Let Linux have the memory of some pages; they hold anything then."""
        for first, last in _runs(pages):
            self._advise(first, last + 1, mmap.MADV_DONTNEED)
        self.use(pages, False)
        self._num_begun = 0

    def _advise(self, first: int, end: int, advice: int) -> None:
        """Tell Linux how the memory of pages is used, as far as it has whole pages of its own."""
        page_bytes, address = self._pages.shape[1], self._pages.ctypes.data
        start = -(-(address + first * page_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (address + end * page_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            size = ctypes.c_size_t(stop - start)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, advice)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    for _, group in groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]
