"""Weights that move to huge pages: what is read meanwhile, and where the kernel says they lie."""

from __future__ import annotations

import gc
import math
import mmap
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sf_local import Engine, SamplingParams
from sf_local.device import host_memory
from sf_local.model import huge_weights, runner
from sf_local.model.huge_weights import HUGE, MOVER, HugeWeights
from tests.support.child import run_program
from tests.support.running import Runners

SIZE = 20 * HUGE + 12345  # bytes of a file; the first and the last may lie in no whole huge page


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
    return sum(m.huge_bytes for whole in weights._wholes for m in mappings(whole))


def whole_bytes(weights: HugeWeights) -> int:
    return sum(len(whole) for whole in weights._wholes)


def writable_bytes() -> int:
    gc.collect()
    return sum(len(m.addresses) for m in mappings() if m.rights.startswith("rw"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some weights\nof two lines"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.fixture(autouse=True)
def enough_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_weights, "free_bytes", lambda: 1 << 40)


@contextmanager
def mapped(
    path: Path, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[tuple[HugeWeights, np.ndarray]]:
    """What moves a file, and its bytes."""
    weights, maps = HugeWeights(), []
    with path.open("rb") as file:

        def load() -> None:
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            meanwhile()

        weights.note(path, load)
    with closing(weights):
        yield weights, np.frombuffer(maps[0], np.uint8)


def move(weights: HugeWeights) -> None:
    """Wait until all is moved; skips where Linux has no huge page left."""
    if huge_weights._are_forbidden():
        pytest.skip("this Linux has no huge pages")
    before = refused()
    weights.start()
    weights.start()
    wait(weights)
    if huge_bytes(weights) < whole_bytes(weights) and refused() > before:
        pytest.skip("no huge page is free")


def wait(weights: HugeWeights) -> None:
    assert weights._thread is not None
    weights._thread.join(60)
    assert not weights._thread.is_alive()


def refused() -> int:
    """How often this machine's kernel had no huge page for who asked."""
    found = re.search(r"^thp_fault_fallback (\d+)", Path("/proc/vmstat").read_text(), re.M)
    return int(found[1]) if found else 0


def test_whole_huge_pages_move_and_read_the_same(file: Path) -> None:
    with mapped(file) as (weights, values):
        start, [whole] = values.ctypes.data, weights._wholes
        assert start <= whole.start < start + HUGE
        assert start + SIZE - HUGE < whole.stop <= start + SIZE
        assert huge_bytes(weights) == 0
        move(weights)
        assert huge_bytes(weights) == whole_bytes(weights) >= 19 * HUGE
        assert {m.rights for m in mappings(whole)} == {"r--p"}
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


def test_it_ends_where_memory_is_short(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mapped(file) as (weights, values):
        needed = whole_bytes(weights)
        free = iter([needed, needed, needed - 1])
        monkeypatch.setattr(huge_weights, "CHECKED", 8 * HUGE)
        monkeypatch.setattr(huge_weights, "free_bytes", lambda: next(free))
        weights.start()
        wait(weights)
        assert huge_bytes(weights) in (0, 16 * HUGE)  # 0 where Linux has no huge pages
        assert next(free, None) is None
        assert values.tobytes() == file.read_bytes()


def test_what_is_to_be_copied_does_not_count_as_free(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def look() -> int:
        seen.append(sum(reservation.num_bytes for reservation in host_memory._reservations))
        return 1 << 40

    with mapped(file) as (weights, _):
        gc.collect()  # of other engines' pages
        others = sum(reservation.num_bytes for reservation in host_memory._reservations)
        monkeypatch.setattr(huge_weights, "CHECKED", 8 * HUGE)
        monkeypatch.setattr(huge_weights, "free_bytes", look)
        move(weights)
        assert [n - others - whole_bytes(weights) for n in seen] == [0, -8 * HUGE, -16 * HUGE]


def refuse(*_: object) -> int | None:
    return huge_weights.FAILED


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (huge_weights._libc, "mmap", refuse),
        (huge_weights._libc, "mremap", refuse),
        (huge_weights.mmap, "MADV_HUGEPAGE", 15),  # MADV_NOHUGEPAGE
        (huge_weights, "_are_forbidden", lambda: True),
    ],
    ids=["no addresses", "no mremap", "small pages", "forbidden"],
)
def test_what_cannot_move_stays(
    file: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, value: Any
) -> None:
    with mapped(file) as (weights, values):
        before = writable_bytes()
        monkeypatch.setattr(where, name, value)
        weights.start()
        wait(weights)
        assert huge_bytes(weights) == 0
        assert values.tobytes() == file.read_bytes()
        assert abs(writable_bytes() - before) < SIZE // 2  # as stacks of threads may remain


@pytest.mark.parametrize(
    ("text", "are_forbidden"),
    [("always madvise [never]\n", True), ("always [madvise] never\n", False), (None, True)],
)
def test_what_linux_says_of_huge_pages(
    text: str | None, are_forbidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text:
        (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(huge_weights, "ENABLED", tmp_path / "enabled")
    assert huge_weights._are_forbidden() is are_forbidden


class Pauses:
    """Before its third and sixth huge page, a mover waits for `go_on`; Linux need not have any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reached, self._may_go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.count = 0
        monkeypatch.setattr(huge_weights, "_get_huge_page", self._get)
        monkeypatch.setattr(huge_weights, "_are_forbidden", lambda: False)

    def _get(self, address: int) -> bool:
        self.count += 1
        if self.count in (3, 6):
            self._reached.release()
            assert self._may_go_on.acquire(timeout=60)
        return True

    def wait(self) -> None:
        assert self._reached.acquire(timeout=60)

    def go_on(self) -> None:
        self._may_go_on.release()


def test_it_ends_when_it_is_closed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst, with the rest of its memory given back."""
    pauses = Pauses(monkeypatch)
    with mapped(file) as (weights, values):
        before = writable_bytes()
        weights.start()
        pauses.wait()
        closer = threading.Thread(target=weights.close)
        closer.start()
        closer.join(0.1)
        assert closer.is_alive()
        pauses.go_on()
        closer.join(60)
        assert not closer.is_alive() and pauses.count == 3
        assert values.tobytes() == file.read_bytes()
        assert abs(writable_bytes() - before) < SIZE // 2


def test_who_maps_a_file_while_it_moves_takes_its_own(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = Pauses(monkeypatch)

    def move_on() -> None:
        pauses.go_on()
        pauses.wait()

    with mapped(file) as (first, _):
        first.start()
        pauses.wait()
        with mapped(file, move_on) as (second, values):
            start, [whole] = values.ctypes.data, second._wholes
            assert start <= whole.start and whole.stop <= start + SIZE
        pauses.go_on()


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
    """Though many map one file at once."""
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
    assert len({start for _, start in found}) == 8
    for weights, start in found:
        [whole] = weights._wholes
        assert start <= whole.start < start + HUGE


def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    program = """
import os
from sf_local.model import huge_weights

with huge_weights._lock:
    child = os.fork()
    if child == 0:
        os._exit(int(huge_weights._lock.locked()))
assert os.waitpid(child, 0)[1] == 0
"""
    run_program(program)


@pytest.mark.model
def test_a_model_answers_the_same_before_meanwhile_and_behind(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners, prompt = Runners(), "The capital of France is"
    params = SamplingParams(max_new_tokens=12, temperature=0)
    with Engine(smollm2, _make_runner=runners) as engine:
        weights = runners[0]._program.huge_weights
        monkeypatch.setattr(runner, "SECONDS_BEFORE_COPY", math.inf)
        before = engine.generate(prompt, params)
        assert weights._thread is None
        monkeypatch.setattr(runner, "SECONDS_BEFORE_COPY", 0)
        meanwhile = engine.generate(prompt, params)
        assert weights._thread is not None
        move(weights)
        assert huge_bytes(weights) == whole_bytes(weights) > 100 << 20
        behind = engine.generate(prompt, params)
        assert before.token_ids == meanwhile.token_ids == behind.token_ids
        assert " Paris" in behind.text


@pytest.mark.model
@pytest.mark.parametrize("count", [1, 4])
def test_an_engine_closes_meanwhile(
    smollm2: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SECONDS_BEFORE_COPY", 0)
    for _ in range(3):
        with Engine(smollm2) as engine:
            engine.generate("Once", max_tokens=count)
        assert MOVER not in {thread.name for thread in threading.enumerate()}
