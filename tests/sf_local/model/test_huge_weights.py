"""Weights that move to huge pages: what is read meanwhile, and where the kernel says they lie."""

from __future__ import annotations

import gc
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sf_local import Engine
from sf_local.model import huge_weights
from sf_local.model.huge_weights import HUGE, HugeWeights
from tests.support.running import Runners

SIZE = 20 * HUGE + 12345  # bytes of a file; the first and the last may lie in no whole huge page
THREAD = "sf_local-huge-pages"


class Mapping(NamedTuple):
    addresses: range
    rights: str
    huge_bytes: int


def mappings(within: range = range(1 << 47)) -> Iterator[Mapping]:
    """What lies at some addresses, by the kernel's list."""
    listed = Path("/proc/self/smaps").read_text()
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", listed, flags=re.M):
        if found := re.match(r"(\w+)-(\w+) (\S+)", part):
            addresses = range(int(found[1], 16), int(found[2], 16))
            if addresses.start < within.stop and within.start < addresses.stop:
                huge = re.search(r"AnonHugePages: +(\d+) kB", part)
                assert huge
                yield Mapping(addresses, found[3], int(huge[1]) << 10)


def huge_bytes(weights: HugeWeights) -> int:
    return sum(m.huge_bytes for whole in weights._mapped for m in mappings(whole))


def whole_bytes(weights: HugeWeights) -> int:
    return sum(len(huge_weights._whole_pages(whole)) for whole in weights._mapped)


def writable_bytes() -> int:
    gc.collect()
    return sum(len(m.addresses) for m in mappings() if m.rights.startswith("rw"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some weights\nof two lines"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@contextmanager
def mapped(path: Path) -> Iterator[tuple[HugeWeights, np.ndarray]]:
    """What moves a file, and its bytes."""
    weights, maps = HugeWeights(), []
    with path.open("rb") as file:
        weights.note(path, lambda: maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))
    with closing(weights):
        yield weights, np.frombuffer(maps[0], np.uint8)


def move(weights: HugeWeights) -> None:
    """Wait until all is moved; skips where Linux has no huge page left."""
    if huge_weights._are_forbidden():
        pytest.skip("this Linux has no huge pages")
    before = refused()
    weights.start()
    weights.start()
    assert weights._thread is not None
    weights._thread.join(60)
    assert not weights._thread.is_alive()
    if refused() > before:
        pytest.skip("no huge page is free")


def refused() -> int:
    """How often this machine's kernel had no huge page for who asked."""
    found = re.search(r"^thp_fault_fallback (\d+)", Path("/proc/vmstat").read_text(), re.M)
    return int(found[1]) if found else 0


def test_whole_huge_pages_move_and_read_the_same(file: Path) -> None:
    with mapped(file) as (weights, values):
        [addresses] = weights._mapped
        assert values.ctypes.data == addresses.start and len(addresses) >= SIZE
        assert huge_bytes(weights) == 0
        move(weights)
        assert huge_bytes(weights) == whole_bytes(weights) >= 19 * HUGE
        assert {m.rights for m in mappings(range(values.ctypes.data, SIZE))} <= {"r--p", "r--s"}
        assert values.tobytes() == file.read_bytes()


def test_who_reads_meanwhile_reads_the_same(file: Path) -> None:
    expected, wrong, is_done = np.frombuffer(file.read_bytes(), np.uint8), [], threading.Event()

    def read(values: np.ndarray, seed: int) -> None:
        draw = np.random.default_rng(seed)
        while not is_done.is_set():
            start = int(draw.integers(SIZE - 100_000))
            if (values[start : start + 100_000] != expected[start : start + 100_000]).any():
                wrong.append(start)

    for _ in range(5):
        with mapped(file) as (weights, values):
            is_done.clear()
            readers = [threading.Thread(target=read, args=(values, seed)) for seed in (1, 2, 3)]
            for reader in readers:
                reader.start()
            try:
                move(weights)
            finally:
                is_done.set()
                for reader in readers:
                    reader.join()
    assert not wrong


@pytest.mark.parametrize("spare", [-1, 0])
def test_as_much_must_stay_free(file: Path, monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    with mapped(file) as (weights, _):
        free = 2 * whole_bytes(weights) + spare
        monkeypatch.setattr(huge_weights, "free_bytes", lambda: free)
        move(weights)
        assert huge_bytes(weights) == (0 if spare < 0 else whole_bytes(weights))


def refuse(*_: object) -> int | None:
    return huge_weights.FAILED


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (huge_weights._libc, "mmap", refuse),
        (huge_weights._libc, "mremap", refuse),
        (huge_weights.mmap, "MADV_HUGEPAGE", 15),  # MADV_NOHUGEPAGE
        (huge_weights, "ENABLED", Path("/proc/version")),
        (huge_weights, "ENABLED", Path("/not/there")),
    ],
    ids=["no addresses", "no mremap", "small pages", "never", "no kernel that has them"],
)
def test_what_cannot_move_stays(
    file: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    with mapped(file) as (weights, values):
        if value == Path("/proc/version"):
            value = file.with_name("enabled")
            value.write_text("always madvise [never]\n")
        before = writable_bytes()
        monkeypatch.setattr(where, name, value)
        weights.start()
        assert weights._thread is not None
        weights._thread.join(60)
        assert huge_bytes(weights) == 0
        assert values.tobytes() == file.read_bytes()
        assert abs(writable_bytes() - before) < SIZE // 2  # as stacks of threads may remain


def test_it_ends_when_it_is_closed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst, with the rest of its memory given back."""
    fill, is_at_third, may_go_on, filled = (
        huge_weights._fill_huge_page, threading.Event(), threading.Event(), [],
    )  # fmt: skip

    def wait_at_third(address: int, source: int) -> bool:
        filled.append(address)
        if len(filled) == 3:
            is_at_third.set()
            assert may_go_on.wait(60)
        return fill(address, source)

    monkeypatch.setattr(huge_weights, "_fill_huge_page", wait_at_third)
    monkeypatch.setattr(huge_weights, "_are_forbidden", lambda: False)
    with mapped(file) as (weights, values):
        before = writable_bytes()
        weights.start()
        assert is_at_third.wait(60)
        closer = threading.Thread(target=weights.close)
        closer.start()
        closer.join(0.1)
        assert closer.is_alive()
        may_go_on.set()
        closer.join(60)
        assert not closer.is_alive() and len(filled) == 3
        assert values.tobytes() == file.read_bytes()
        assert abs(writable_bytes() - before) < SIZE // 2


def test_nothing_is_moved_where_no_thread_is_left(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with mapped(file) as (weights, values):
        monkeypatch.setattr(threading.Thread, "start", fail)
        weights.start()
        weights.start()
        assert values.tobytes() == file.read_bytes()


def test_each_moves_what_it_has_mapped(file: Path) -> None:
    """Though many map one file at once, and one is unmapped."""
    found: list[tuple[HugeWeights, int]] = []

    def open_and_keep() -> None:
        with mapped(file) as (weights, values):
            found.append((weights, values.ctypes.data))
            everyone.wait(60)

    everyone = threading.Barrier(8)
    threads = [threading.Thread(target=open_and_keep) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [[start] for _, start in found] == [[m.start for m in w._mapped] for w, _ in found]
    assert len({start for _, start in found}) == 8


def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    with huge_weights._lock:
        child = os.fork()
        if child == 0:
            os._exit(int(huge_weights._lock.locked()))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.model
def test_a_model_answers_the_same_before_meanwhile_and_behind(smollm2: Path) -> None:
    runners, prompt = Runners(), "The capital of France is"
    with Engine(smollm2, _make_runner=runners) as engine:
        weights = runners[0]._program.huge_weights
        before = engine.generate(prompt, max_tokens=1, temperature=0)
        meanwhile = engine.generate(prompt, max_tokens=12, temperature=0)
        move(weights)
        assert huge_bytes(weights) == whole_bytes(weights) > 100 << 20
        behind = engine.generate(prompt, max_tokens=12, temperature=0)
        assert behind.token_ids == meanwhile.token_ids and " Paris" in behind.text
        assert behind.token_ids[:1] == before.token_ids
    assert not [m for whole in weights._mapped for m in mappings(whole) if m.rights != "---p"]


@pytest.mark.model
@pytest.mark.parametrize("wait", [lambda e: None, lambda e: e.generate("And", max_tokens=3)])
def test_an_engine_closes_meanwhile(smollm2: Path, wait: Callable[[Engine], object]) -> None:
    for _ in range(3):
        with Engine(smollm2) as engine:
            engine.generate("Once", max_tokens=1)
            wait(engine)
        assert THREAD not in {thread.name for thread in threading.enumerate()}
