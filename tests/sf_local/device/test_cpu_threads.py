"""One worker thread on each core that the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sf_local.device import cpu_threads

PROGRAM = """
import os, sys, time
cores = [int(core) for core in sys.argv[1].split(",")]
os.sched_setaffinity(0, cores)
from sf_local.device.device import Device
def workers():
    for task in os.listdir("/proc/self/task"):
        if open(f"/proc/self/task/{task}/comm").read().startswith("iree-worker"):
            yield from os.sched_getaffinity(int(task))
device = Device("cpu")
end = time.monotonic() + 30  # a thread has its name once it has run
while sorted(workers()) != cores and time.monotonic() < end:
    time.sleep(0.01)
print(*workers())
device.close()
"""


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_on_each_core(count: int) -> None:
    cores = cpu_threads.usable_cores()[:count]
    command = [sys.executable, "-c", PROGRAM, ",".join(map(str, cores))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert sorted(map(int, done.stdout.split())) == cores, done.stderr


FEWER = """
from sf_local.device.device import Device
one, other, all = Device("cpu", 1), Device("cpu", 1), Device("cpu")
print(*one.cores, *other.cores, *all.cores)
one.close()
print(*Device("cpu", 1).cores)
"""


@pytest.mark.skipif(len(cpu_threads.usable_cores()) < 2, reason="needs two cores")
def test_fewer_threads_take_cores_that_others_do_not_use() -> None:
    cores = cpu_threads.usable_cores()
    done = subprocess.run([sys.executable, "-c", FEWER], capture_output=True, text=True, timeout=60)
    used, again = ([int(core) for core in line.split()] for line in done.stdout.splitlines())
    assert used == [*cores[:2], *cores], done.stderr
    assert again == cores[:1]


def test_usable_cores_are_allowed_ones() -> None:
    assert set(cpu_threads.usable_cores()) <= os.sched_getaffinity(0)


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
    assert cpu_threads.usable_cores() == [1, 2, 3, 4]


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
