"""shortfin systems: a device that is open, and IREE's process-wide flags.

A `Device` owns a system with one worker thread; the engine runs on that worker. Only this file,
arrays.py and runner.py import shortfin.
"""

from __future__ import annotations

import ctypes
import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import shortfin as sf

from sf_local.device.cpu_threads import usable_cores, workers_on
from sf_local.device.info import find_device
from sf_local.device.symbol_patch import keep_joined_statuses
from sf_local.errors import DeviceError

# Decode is a chain of short dispatches: without spinning, workers sleep between them (12.6 ms a
# token against 10.0). amdsharktank's CPU code needs more than the default 128 KiB of stack.
IREE_FLAGS = ("--task_worker_spin_us=20", "--task_worker_stack_size=4194304")
PATIENCE = 120.0  # seconds: a GPU that has not finished a call by then has failed
GRACE = 2.0  # seconds for the worker of a failed GPU to go to sleep
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18

T = TypeVar("T")

_flags_parsed = False


class Device:
    """An open device. `close()` ends its threads; free all arrays first."""

    def __init__(self, spec: str) -> None:
        info = find_device(spec)
        self.kind, self.index, self.chip = info.kind, info.index, info.chip
        self.shares_memory = self.kind == "cpu"  # with the host
        _parse_iree_flags()
        self.system = _cpu_system() if self.kind == "cpu" else _hip_system(self.index)
        self.worker = self.system.create_worker("sf_local")
        self._is_lost = False  # it did not answer: its worker may wait for ever
        self._pending_since: float | None = None  # of a call under way, for the watch
        self._lock, self._is_closed = threading.Lock(), threading.Event()
        self.renew()

    def renew(self) -> None:
        """A new fiber: after a failed invocation the old one's timeline never moves again."""
        self.fiber = self.system.create_fiber(self.worker)
        self.scoped = self.fiber.device(0)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a coroutine on the worker thread; it must catch its own exceptions."""

        def start() -> None:
            self._task = self.worker.loop.create_task(coroutine)

        self.worker.call_threadsafe(start)

    def watch(self, give_up: Callable[[DeviceError], None]) -> None:
        """Call `give_up` once, from a thread of its own, when a GPU does not finish a call."""
        if not self.shares_memory:
            threading.Thread(
                target=self._watch, args=(give_up,), name="sf_local-watch", daemon=True
            ).start()

    def _watch(self, give_up: Callable[[DeviceError], None]) -> None:
        while not self._is_closed.wait(PATIENCE / 8):
            with self._lock:
                since = self._pending_since
                self._is_lost = since is not None and time.monotonic() - since > PATIENCE
            if self._is_lost:
                give_up(DeviceError(f"no answer from the device for {PATIENCE:.0f} seconds"))
                return

    def finish(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Await work on the device with the watch on; of one call at a time, on the worker thread.

        IREE can wait for ever for a GPU that failed, awaited or within a call of its own.
        """
        return work if self.shares_memory else self._finish(work)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        self._pending_since = time.monotonic()
        try:
            return await work
        finally:
            with self._lock:
                self._pending_since = None
            if self._is_lost:  # the watch has ended what this was for
                raise DeviceError("the device answered too late")

    def leak(self, *objects: object) -> None:
        """Keep the device and `objects` on it for ever, instead of closing.

        A failed invocation leaves a fence that is never signalled, and a forked child has no worker
        thread: freeing the device would wait for them until the process is killed.
        """
        for leaked in (self, *objects):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))

    def leak_in_child(self, *objects: object) -> None:
        """`abandon`, in a forked child: there shortfin's own exit handler would wait as well."""
        self.leak(*objects)
        for reference in weakref.getweakrefs(self.system):
            for owner in gc.get_referrers(reference):
                if isinstance(owner, set):  # of the WeakSet of systems to shut down at exit
                    owner.discard(reference)

    def leak_and_park(self, *objects: object) -> None:
        """`abandon` a GPU that failed; its threads cannot all be ended.

        The worker sleeps for ever, or it would want the interpreter when that is gone.
        """
        self._is_closed.set()
        self.leak_in_child(*objects)
        asleep, never = threading.Event(), threading.Event()

        def sleep() -> None:
            asleep.set()
            never.wait()

        self.worker.call_threadsafe(sleep)
        asleep.wait(GRACE)

    def close(self) -> None:
        self._is_closed.set()
        del self.scoped, self.fiber, self.worker
        self.system.shutdown()
        del self.system


def _cpu_system() -> Any:
    library = _libshortfin()
    with workers_on(ctypes.CDLL(str(library)), library, usable_cores()):
        return sf.host.CPUSystemBuilder().create_system()


def _hip_system(index: int) -> Any:
    """A system with the `index`-th GPU alone."""
    library = _libshortfin()
    keep_joined_statuses(ctypes.CDLL(str(library)), library)
    try:
        builder = sf.amdgpu.SystemBuilder()
        available = list(builder.available_devices)
    except Exception as error:
        raise DeviceError(
            f"device='hip': the AMD driver or libamdhip64.so is not usable ({reason(error)}); "
            "install ROCm, point IREE_HIP_DYLIB_PATH at its folder, or use device='cpu'"
        ) from error
    builder.visible_devices = [available[index]]
    try:
        return builder.create_system()
    except Exception as error:
        raise DeviceError(f"device='hip:{index}' cannot be opened: {reason(error)}") from error


def _parse_iree_flags() -> None:
    """Set IREE_FLAGS in the registry that libshortfin exports; shortfin has no option for them."""
    global _flags_parsed
    if _flags_parsed:
        return
    _flags_parsed = True
    library = ctypes.CDLL(str(_libshortfin()))
    arguments = [b"sf_local", *(flag.encode() for flag in IREE_FLAGS)]
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None)
    argc = ctypes.c_int(len(arguments))
    pointer = ctypes.cast(argv, ctypes.POINTER(ctypes.c_char_p))
    library.iree_flags_parse(0, ctypes.byref(argc), ctypes.byref(pointer))


def allow_tiles() -> bool:
    """Whether Linux lets this process use tile registers (AMX): one that does not ask is killed."""
    libc = ctypes.CDLL(None)
    return int(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


def _libshortfin() -> Path:
    """The library that `import shortfin` loaded."""
    return Path(re.findall(r"/.*/libshortfin.*", Path("/proc/self/maps").read_text())[0])


def reason(error: BaseException) -> str:
    """What a user can make use of in the message of an error, which IREE's may be pages long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^(\w+Error: )?\S+\.(c|cc|cpp|h):\d+: ", "", lines[0])
    if text == "ABORTED; the semaphore was aborted":
        return "a call of its driver failed, and IREE does not say which (ABORTED)"
    return re.split("; (?:while (?:invoking|calling)|mismatched target chip)", text)[0][:300]
