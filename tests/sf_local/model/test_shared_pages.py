"""KV pages in the host's memory: what Linux says is resident."""

from __future__ import annotations

import ctypes
import gc
import mmap
import time
from pathlib import Path

import numpy as np
import pytest

from sf_local import Engine, SamplingParams
from sf_local.device import host_memory
from sf_local.model.arrays import mapped
from sf_local.model.shared_pages import SharedPages
from tests.support.running import Runners
from tests.support.tiny import TinyModel

NUM_PAGES = 1 << 15  # 64 MiB: an allocation of its own, which was nobody's before


def resident(values: np.ndarray) -> int:
    """Bytes of an array that are in memory."""
    start = values.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = values.ctypes.data + values.nbytes - start
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def test_memory_is_taken_as_it_is_used(tiny: TinyModel) -> None:
    """And given back, whatever the requests were."""
    params, runners = SamplingParams(max_new_tokens=150, temperature=0, ignore_eos=True), Runners()
    with Engine(tiny.artifact, kv_pages=NUM_PAGES - 1, _make_runner=runners) as engine:
        pages = mapped(runners[0]._pages.array)
        page_bytes = len(pages) // NUM_PAGES
        few = 4 << 20  # two huge pages, if Linux uses these for all
        assert resident(pages) <= few
        alone = [engine.generate([5] * n, params).token_ids for n in (1, 60, 100)]
        used = engine.stats()["pages_cached"]
        assert page_bytes * used <= resident(pages) <= page_bytes * used + few
        for count in (200, 1):
            handles = [engine.submit([i % 250 + 5] * 100, params) for i in range(count)]
            assert {handle.result().completion_tokens for handle in handles} == {150}
        assert resident(pages) >= page_bytes * engine.stats()["pages_cached"] > 2 * few
        ends_at = time.monotonic() + 60
        while resident(pages) < 1.5 * page_bytes * engine.stats()["pages_cached"]:
            assert time.monotonic() < ends_at, "an engine that waits asks for memory ahead"
        engine.flush_cache()
        assert resident(pages) <= few
        assert [engine.generate([5] * n, params).token_ids for n in (1, 60, 100)] == alone


def test_pages_in_use_keep_their_memory() -> None:
    pages = np.full((64, 3 * mmap.PAGESIZE + 100), 7, np.uint8)
    SharedPages(pages).give_back([5, 4, 60, 6, 63])
    free = np.isin(np.arange(64), [4, 5, 6, 60, 63])
    assert (pages[~free] == 7).all()
    for run in (pages[4:7], pages[60:61], pages[63:]):
        assert np.count_nonzero(run) < 2 * mmap.PAGESIZE


def test_memory_ahead() -> None:
    """Of pages of 1 MiB: as many as were begun, two at a time, and at most 64."""
    memory = mmap.mmap(-1, 256 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = np.frombuffer(memory, np.uint8).reshape(256, 1 << 20)
    shared, free, few = SharedPages(pages), list(range(255, 0, -1)), 4 << 20

    def begin(count: int) -> list[int]:
        begun = [free.pop() for _ in range(count)]
        shared.clear(begun)
        return begun

    def ask() -> int:
        count = 0
        while shared.ask_ahead(reversed(free)):
            count += 1
        return count

    assert ask() == 0
    begin(11)
    assert resident(pages) <= (11 << 20) + few
    assert ask() == 6
    before = resident(pages)
    assert 22 << 20 <= before <= (22 << 20) + few
    begun = begin(11)
    assert resident(pages) == before
    assert ask() == 6 and ask() == 0
    free += reversed(begun)
    assert begin(11) == begun and ask() == 0  # these have memory, and so do those behind them
    begin(150)
    assert ask() == 32
    pages[free[0]] = 7  # which nobody has
    shared.give_back(free)
    assert ask() == 0 and resident(pages) <= (172 << 20) + few
    begin(len(free))
    assert ask() == 0 and not pages[255].any()  # none is left


def test_what_is_not_used_yet_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(f"MemAvailable: {8 << 20} kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", tmp_path / "none")
    gc.collect()  # of other engines' pages
    before, pages = host_memory.free_bytes(), np.zeros((10, 100), np.uint8)
    shared = SharedPages(pages)
    assert before - host_memory.free_bytes() == 1000
    shared.clear([1, 2, 3])
    shared.use([3, 4])
    assert before - host_memory.free_bytes() == 600
    shared.give_back([1, 4])
    assert before - host_memory.free_bytes() == 800
    del shared
    assert host_memory.free_bytes() == before
