"""shortfin systems: a device that is open, and IREE's process-wide flags.

A `Device` owns a system with one worker thread; the engine runs on that worker. Only this file,
arrays.py and runner.py import shortfin.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import re
import threading
import weakref
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import shortfin as sf

from sf_local.cpu_threads import usable_cores, workers_on
from sf_local.device_info import find_device
from sf_local.errors import DeviceError
from sf_local.linkage import keep_joined_statuses

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
        self._pending: asyncio.Future[Any] | None = None  # what the watch looks at
        self._pending_since = 0.0
        self._is_watched = False
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

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work on the device; of one call at a time, on the worker thread.

        IREE can wait for ever for a GPU that failed: after `PATIENCE` this raises DeviceError.
        """
        if self.shares_memory:
            return await work
        loop = self.worker.loop
        pending: asyncio.Future[T] = loop.create_future()
        self._pending, self._pending_since = pending, loop.time()
        task = loop.create_task(_settle(work, pending))
        if not self._is_watched:
            self._watch(PATIENCE)
        try:
            return await pending
        finally:
            self._pending = None
            task.cancel()

    def _watch(self, seconds: float) -> None:
        """Look after so many seconds; only once at a time, since IREE's poller has few places."""
        self._is_watched = True
        self.worker.loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._is_watched = False
        if self._pending is None or self._pending.done():
            return
        seconds_left = self._pending_since + PATIENCE - self.worker.loop.time()
        if seconds_left > 0:
            self._watch(seconds_left)
        else:
            self._pending.set_exception(
                DeviceError(f"no answer from the device for {PATIENCE:.0f} seconds")
            )

    def abandon(self, *objects: object) -> None:
        """Keep the device and `objects` on it for ever, instead of closing.

        A failed invocation leaves a fence that is never signalled, and a forked child has no worker
        thread: freeing the device would wait for them until the process is killed.
        """
        for leaked in (self, *objects):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))

    def forget(self, *objects: object) -> None:
        """`abandon`, in a forked child: there shortfin's own exit handler would wait as well."""
        self.abandon(*objects)
        for reference in weakref.getweakrefs(self.system):
            for owner in gc.get_referrers(reference):
                if isinstance(owner, set):  # of the WeakSet of systems to shut down at exit
                    owner.discard(reference)

    def lose(self, *objects: object) -> None:
        """`abandon` a GPU that failed; its threads cannot all be ended.

        The worker sleeps for ever, or it would want the interpreter when that is gone.
        """
        self.forget(*objects)
        asleep, never = threading.Event(), threading.Event()

        def sleep() -> None:
            asleep.set()
            never.wait()

        self.worker.call_threadsafe(sleep)
        asleep.wait(GRACE)

    def close(self) -> None:
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


async def _settle(work: Coroutine[Any, Any, T], pending: asyncio.Future[T]) -> None:
    """Hand over what comes of work, unless nobody waits any more."""
    try:
        result = await work
    except Exception as error:
        if not pending.done():
            pending.set_exception(error)
    else:
        if not pending.done():
            pending.set_result(result)
