"""Device: an open CPU or GPU, which is a shortfin system with one worker thread.

The engine runs on that worker. Sets IREE's process-wide flags. Only this module and those of
`sf_local.model` import shortfin.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

# shortfin imports it with its first worker; a child that is forked meanwhile would wait for ever
import _shortfin.asyncio_bridge  # noqa: F401
import shortfin as sf

from sf_local.device.cpu_threads import ask_for_short_slices, num_usable_cores, worker_threads
from sf_local.device.info import find_device
from sf_local.device.symbol_patch import keep_joined_statuses
from sf_local.errors import DeviceError

# A decode is a chain of short dispatches, and workers that do not spin sleep between them (12.6 ms
# a token instead of 10.0). amdsharktank's CPU code needs more than the default 128 KiB of stack.
IREE_FLAGS = ("--task_worker_spin_us=20", "--task_worker_stack_size=4194304")
PATIENCE = 120.0  # seconds that a call on a GPU may take; the GPU has failed after that
GRACE = 2.0  # seconds to wait until the worker of a failed GPU is parked
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18

T = TypeVar("T")

_flags_parsed = False
_open: set[Device] = set()
_of_parent: list[Device] = []  # open devices of the process that forked this one
# Held while the process's flags and libshortfin's slots change: systems that are created meanwhile
# would get the other's threads, and slots be restored to code that is freed. A fork waits for it,
# since a child that inherits it locked could open no device.
_process_lock = threading.Lock()


class Device:
    """An open device. `close` ends its threads; free all arrays on it first.

    spec: a name as in `info.find_device`, which tells what is raised; DeviceError also if the
    device cannot be opened. num_threads: of a CPU; by default one for each core that the process
    may use.

    kind: "cpu" or "hip". index: of a GPU, among those of its kind. chip: its target, "cpu" or such
    as "gfx942". shares_memory: whether the host's memory is the device's. system, worker, fiber,
    scoped: shortfin's objects; `await scoped` waits for all that was queued.
    """

    def __init__(self, spec: str, num_threads: int | None = None) -> None:
        info = find_device(spec)
        self.kind, self.index, self.chip = info.kind, info.index, info.chip
        self.shares_memory = is_cpu = self.kind == "cpu"
        with _process_lock:
            _parse_iree_flags()
            self.system = _cpu_system(num_threads) if is_cpu else _hip_system(self.index)
            _open.add(self)
        self._is_lost = False  # a call took too long, and the worker may wait for ever
        self._pending_since: float | None = None  # when the call under way began, for the watch
        self._lock, self._is_closed = threading.Lock(), threading.Event()
        try:
            self.worker = self.system.create_worker("sf_local")
            self.renew()
        except Exception as error:
            _open.discard(self)
            self.leak()  # it cannot be shut down with a worker that did not start
            self._keep_from_exit()
            raise _cannot_be_opened(spec, error) from error

    def renew(self) -> None:
        """Make a new fiber: after a failed call the old one's timeline never moves on."""
        self.fiber = self.system.create_fiber(self.worker)
        self.scoped = self.fiber.device(0)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a coroutine on the worker thread; it must catch its own exceptions."""

        def start() -> None:
            self._task = self.worker.loop.create_task(coroutine)

        self.worker.call_threadsafe(start)

    def watch(self, give_up: Callable[[DeviceError], None]) -> None:
        """Call `give_up` from a thread of its own if a GPU's call takes more than PATIENCE."""
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
        """Await work on the device under the watch; one at a time, on the worker thread.

        IREE may wait for ever for a GPU that failed. If the work ends after the watch gave up on
        it, this raises DeviceError.
        """
        return work if self.shares_memory else self._finish(work)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        self._pending_since = time.monotonic()
        try:
            return await work
        finally:
            with self._lock:
                self._pending_since = None
            if self._is_lost:
                raise DeviceError("the device answered too late")

    def leak(self, *objects: object) -> None:
        """Keep the device and `objects` that lie on it for ever, instead of closing it.

        Freeing it would wait for ever: after a failed call for a fence that is never signalled, in
        a forked child for a worker thread that does not exist there.
        """
        for leaked in (self, *objects):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))

    def _keep_from_exit(self) -> None:
        """Let shortfin's exit handler not wait for this device."""
        for reference in weakref.getweakrefs(self.system):
            for owner in gc.get_referrers(reference):
                if isinstance(owner, set):  # inside the WeakSet of systems to shut down at exit
                    owner.discard(reference)

    def leak_and_park(self, *objects: object) -> None:
        """`leak` a GPU that failed, and park its worker.

        The worker cannot be ended, and would otherwise take the GIL after interpreter shutdown.
        """
        self._is_closed.set()
        self.leak(*objects)
        self._keep_from_exit()
        asleep, never = threading.Event(), threading.Event()

        def sleep() -> None:
            asleep.set()
            never.wait()

        self.worker.call_threadsafe(sleep)
        asleep.wait(GRACE)

    def close(self) -> None:
        """End the worker and free the device."""
        self._is_closed.set()
        del self.scoped, self.fiber, self.worker
        self.system.shutdown()
        _open.discard(self)
        del self.system


def _leak_all() -> None:
    """In a forked child: what is open belongs to the parent."""
    _process_lock.release()
    _of_parent.extend(_open)
    _open.clear()
    for device in _of_parent:
        device.leak()


@atexit.register  # behind shortfin's own handler, so run before it
def _keep_all_from_exit() -> None:
    for device in _of_parent:
        device._keep_from_exit()


os.register_at_fork(
    before=_process_lock.acquire,
    after_in_parent=_process_lock.release,
    after_in_child=_leak_all,
)


def _cpu_system(num_threads: int | None) -> Any:
    library, count = libshortfin(), num_threads or num_usable_cores()
    ask_for_short_slices()
    with worker_threads(ctypes.CDLL(str(library)), library, count):
        try:
            return sf.host.CPUSystemBuilder().create_system()
        except Exception as error:
            raise _cannot_be_opened("cpu", error) from error


def _hip_system(index: int) -> Any:
    """A system of one GPU."""
    library = libshortfin()
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
        raise _cannot_be_opened(f"hip:{index}", error) from error


def _cannot_be_opened(spec: str, error: Exception) -> DeviceError:
    return DeviceError(f"device={spec!r} cannot be opened: {reason(error)}")


def _parse_iree_flags() -> None:
    """Set IREE_FLAGS once, through IREE's own parser: shortfin has no option for them."""
    global _flags_parsed
    if _flags_parsed:
        return
    _flags_parsed = True
    library = ctypes.CDLL(str(libshortfin()))
    arguments = [b"sf_local", *(flag.encode() for flag in IREE_FLAGS)]
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None)
    argc = ctypes.c_int(len(arguments))
    pointer = ctypes.cast(argv, ctypes.POINTER(ctypes.c_char_p))
    library.iree_flags_parse(0, ctypes.byref(argc), ctypes.byref(pointer))


def allow_tiles() -> bool:
    """Ask Linux for AMX tile registers, and tell whether it allows them.

    A process that uses them without having asked is killed.
    """
    libc = ctypes.CDLL(None)
    return int(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


def libshortfin() -> Path:
    """The path of the library that `import shortfin` loaded."""
    return Path(re.findall(r"/.*/libshortfin.*", Path("/proc/self/maps").read_text())[0])


def reason(error: BaseException) -> str:
    """The part of an error's message that helps a user: IREE's messages may fill pages.

    The name of its type if it has none, or raises while it is asked.
    """
    message = ""
    with contextlib.suppress(BaseException):
        message = str(error)
    lines = message.strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^(\w+Error: )?\S+\.(c|cc|cpp|h):\d+: ", "", lines[0])
    if text == "ABORTED; the semaphore was aborted":
        return "a call of its driver failed, and IREE does not say which (ABORTED)"
    return re.split("; (?:while (?:invoking|calling)|mismatched target chip)", text)[0][:300]
