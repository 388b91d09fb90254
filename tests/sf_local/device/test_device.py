"""The worker thread of a CPU device."""

import threading
from queue import SimpleQueue
from unittest.mock import MagicMock

import pytest

from sf_local.device import device as opened
from sf_local.device.device import Device
from sf_local.errors import DeviceError
from tests.support.child import run_program


def test_coroutines_run_on_the_worker_thread() -> None:
    device, seen = Device("cpu"), SimpleQueue[int]()

    async def work() -> None:
        seen.put(threading.get_ident())

    try:
        for _ in range(3):
            device.run(work())
        threads = {seen.get(timeout=30) for _ in range(3)}
    finally:
        device.close()
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_devices_open_and_close_again_and_side_by_side() -> None:
    for _ in range(3):
        devices = [Device("cpu"), Device("cpu")]
        for device in devices:
            assert (device.kind, device.index) == ("cpu", 0)
            device.close()


IN_THREADS = """
import contextlib, ctypes, os, threading, time
from pathlib import Path
from sf_local.device.device import Device, libshortfin
from sf_local.device.symbol_patch import call_slot
path = libshortfin()
slot = call_slot(
    ctypes.CDLL(str(path)), path, "iree_task_topology_initialize_from_physical_cores"
)
before = slot.value
cores = sorted(os.sched_getaffinity(0))[:2] * 2
def open_on(core):
    os.sched_setaffinity(0, [core])  # this thread's
    devices.append(Device("cpu"))
def worker_cores():
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text().startswith("iree-worker"):
                yield from os.sched_getaffinity(int(task.name))
for _ in range(5):
    devices = []
    threads = [threading.Thread(target=open_on, args=[core]) for core in cores]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert slot.value == before, "the slot points to code that is freed"
    end = time.monotonic() + 30  # a thread has its name once it has run
    while sorted(worker_cores()) != sorted(cores):
        assert time.monotonic() < end, [*worker_cores()]
    [device.close() for device in devices]
"""


def test_devices_that_several_threads_open_at_once() -> None:
    """Each has the cores of its own thread, and no slot of libshortfin is left that points to code
    which is freed: it would end the process later."""
    run_program(IN_THREADS)


def test_flags_are_set_before_any_system_is_made() -> None:
    """Also if another thread has begun to set them."""
    program = """
import threading
from unittest.mock import MagicMock
from sf_local.device import device
made, begun = [], threading.Event()
class Library:
    def iree_flags_parse(self, *_):
        begun.set()
        threading.Event().wait(0.3)
        made.append("flags")
class Builder:
    def create_system(self):
        made.append("system")
        return MagicMock()
device.ctypes.CDLL = lambda _: Library()
device.worker_threads = device.ask_for_short_slices = MagicMock()
device.sf.host.CPUSystemBuilder = Builder
first = threading.Thread(target=device.Device, args=["cpu"])
first.start()
begun.wait()
device.Device("cpu")
first.join()
print(*made)
"""
    assert run_program(program).split() == ["flags", "system", "system"]


def test_a_fork_while_another_thread_opens_a_device() -> None:
    """The child finds libshortfin as it was, and opens a device of its own."""
    program = """
import ctypes, os, signal, sys, threading, time
from sf_local.device import device
from sf_local.device.symbol_patch import call_slot
path = device.libshortfin()
slot = call_slot(
    ctypes.CDLL(str(path)), path, "iree_task_topology_initialize_from_physical_cores"
)
before, modules = slot.value, {*sys.modules}
Builder, begun = device.sf.host.CPUSystemBuilder, threading.Event()
class SlowBuilder:
    def create_system(self):
        begun.set()
        time.sleep(0.5)
        return Builder().create_system()
device.sf.host.CPUSystemBuilder = SlowBuilder
thread = threading.Thread(target=lambda: device.Device("cpu").close())
thread.start()
begun.wait()
child = os.fork()
device.sf.host.CPUSystemBuilder = Builder
if child == 0:
    signal.alarm(20)
    is_patched = slot.value != before
    device.Device("cpu").close()
    os._exit(is_patched)
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert {*sys.modules} == modules, "a child may be forked during the import"
"""
    run_program(program)


@pytest.mark.parametrize("fails", ["create_system", "create_worker", "create_fiber"])
def test_a_device_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """As where the system allows no more threads; the next one opens."""
    before, system, builder = set(opened._open), MagicMock(), MagicMock()
    builder.create_system.return_value = system
    error = ValueError("src/iree/threading.c:175: INTERNAL; thread creation failed with 11")
    setattr(builder if fails == "create_system" else system, fails, MagicMock(side_effect=error))
    with monkeypatch.context() as patch:
        patch.setattr(opened.sf.host, "CPUSystemBuilder", lambda: builder)
        with pytest.raises(DeviceError, match="'cpu' cannot be opened: INTERNAL; thread creation"):
            Device("cpu")
    assert opened._open == before
    Device("cpu").close()
