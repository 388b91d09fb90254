"""As many worker threads as the process may use cores, each on any of them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sf_local.device import cpu_threads
from sf_local.device.device import libshortfin

PROGRAM = """
import os, sys, time
os.sched_setaffinity(0, [int(core) for core in sys.argv[1].split(",")])
allowed = os.sched_getaffinity(0)
from sf_local.device.cpu_threads import usable_cores
from sf_local.device.device import Device
cores = sorted(usable_cores())
def workers():
    for task in os.listdir("/proc/self/task"):
        if open(f"/proc/self/task/{task}/comm").read().startswith("iree-worker"):
            yield sorted(os.sched_getaffinity(int(task)))
count = int(sys.argv[2]) if len(sys.argv) > 2 else None
device = Device("cpu", count)
end = time.monotonic() + 30  # a thread has its name once it has run
while len([*workers()]) < (count or len(cores)) and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.1)  # in which a worker would bind itself
print([*workers()] == [cores] * (count or len(cores)), [*workers()])
device.close()
assert os.sched_getaffinity(0) == allowed
"""


@pytest.mark.parametrize("num_cores", [1, 2])
@pytest.mark.parametrize("count", [[], ["1"], ["2"], ["3"]])
def test_workers_run_on_any_core(num_cores: int, count: list[str]) -> None:
    """As many as there are cores, or as asked."""
    cores = sorted(cpu_threads.usable_cores())[:num_cores]
    command = [sys.executable, "-c", PROGRAM, ",".join(map(str, cores)), *count]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("True") and not done.stderr, done.stdout + done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_no_two_workers_share_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here two CPUs are one core."""
    allowed = sorted(os.sched_getaffinity(0))[:2]
    program = PROGRAM.replace(
        "from sf_local.device.device",
        "from sf_local.device import cpu_threads\n"
        "cpu_threads._siblings = lambda cpu: {*allowed}\n"
        "from sf_local.device.device",
    )
    command = [sys.executable, "-c", program, ",".join(map(str, allowed)), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"True [[{allowed[0]}], [{allowed[0]}]]\n" and not done.stderr, done

    class Broken(Exception):
        pass

    before, path = os.sched_getaffinity(0), libshortfin()
    monkeypatch.setattr(cpu_threads, "_siblings", lambda cpu: before)
    with pytest.raises(Broken), cpu_threads.worker_threads(ctypes.CDLL(str(path)), path, 1):
        assert os.sched_getaffinity(0) == {min(before)}
        raise Broken
    assert os.sched_getaffinity(0) == before


SLICES = """
import ctypes, os, threading
from sf_local.device import cpu_threads
def attributes():
    found = cpu_threads._Attributes()
    assert ctypes.CDLL(None).syscall(315, 0, ctypes.byref(found), ctypes.sizeof(found), 0) == 0
    return found
nice, before = os.nice(3), attributes()
# Linux before 6.12 tells no slice; those of other policies are left alone
has_slices = before.runtime and before.policy == os.SCHED_OTHER
cpu_threads.ask_for_short_slices()
expected = nice, cpu_threads.SLICE if has_slices else before.runtime
def check():
    assert (attributes().nice, attributes().runtime) == expected, attributes().runtime
check()
threads = [threading.Thread(target=check)]
threads[0].start()
threads[0].join()
print("good")
"""


def test_short_slices() -> None:
    """Threads that are started later have them, too; the process stays as nice as it was."""
    done = subprocess.run(
        [sys.executable, "-c", SLICES], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "good\n" and not done.stderr, done.stderr


def test_usable_cores_are_allowed_ones() -> None:
    assert 1 <= cpu_threads.num_usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("content", "count"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 63), ("", 63), (None, 63)],
)
def test_a_containers_quota(
    content: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(cpu_threads, "QUOTA", tmp_path / "cpu.max")
    assert cpu_threads._quota() == count


def test_hyperthreads_share_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 4, 9})
    monkeypatch.setattr(cpu_threads, "_siblings", lambda cpu: {cpu % 8, cpu % 8 + 8})
    monkeypatch.setattr(cpu_threads, "_quota", lambda: 63)
    assert cpu_threads.usable_cores() == {1, 2, 3, 4}
    assert cpu_threads.num_usable_cores() == 4


CLAIM = """
import os, sys
from sf_local.device.cpu_threads import claim_cpus
claims = claim_cpus(int(sys.argv[1]))
print(len(claims), *os.sched_getaffinity(0), flush=True)
sys.stdin.read()
"""


@contextmanager
def claiming(count: int) -> Iterator[tuple[int, set[int]]]:
    """A process that claims CPUs: how many it has got, and on which it may run."""
    command = [sys.executable, "-c", CLAIM, str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        got, *cpus = map(int, process.stdout.readline().split())
        yield got, set(cpus)
        process.kill()


def test_processes_share_the_cpus() -> None:
    """A process that was killed has none."""
    everything = os.sched_getaffinity(0)
    half = max(len(everything) // 2, 1)
    for _ in range(2):
        with claiming(half) as (got, first):
            assert got == half == len(first)
            with claiming(1000) as (got, rest):
                assert rest == (everything - first or everything)
                assert got == len(everything - first)
                with claiming(1) as (got, unclaimed):
                    assert (got, unclaimed) == (0, everything)
