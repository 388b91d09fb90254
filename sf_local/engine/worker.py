"""Worker: the thread of one device, which runs an engine core step by step.

Other threads put functions into its inbox, which it calls between two steps.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from sf_local.device.device import Device
from sf_local.engine.failures import Failures
from sf_local.errors import DeviceError, EngineError, SfLocalError
from sf_local.model.runner import ModelRunner


class Work(Protocol):
    """What a worker runs, on its own thread. runner: what lies on the device."""

    runner: ModelRunner

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""

    async def start(self) -> None:
        """Prepare the device; called once, before the first step."""

    async def step(self, started_at: float) -> bool:
        """Do one step; False if there was nothing to do. started_at: `time.perf_counter()`."""

    def fail_all(self, make_error: Callable[[], SfLocalError]) -> None:
        """End every request with an error of its own."""


Core = TypeVar("Core", bound=Work)


class Worker(Generic[Core]):
    """Opens a device and runs a core on its thread until closed.

    Public methods may be called from any thread.
    """

    def __init__(self, device: str, open_core: Callable[[Device, Failures], Core]) -> None:
        """Raises what `open_core` raises, and DeviceError for a device that fails at start.

        device: its name. open_core: makes the core, once, on the open device.
        """
        self._inbox: deque[Callable[[], None]] = deque()
        self._idle: Any = None  # the future that the thread waits on when it has no work
        self._is_closing = self._is_draining = False
        self._failure: BaseException | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._close_lock, self._fail_lock = threading.Lock(), threading.Lock()
        self._process_id, self._thread_id = os.getpid(), 0
        self._device = Device(device)
        self._failures = Failures(f"device={device!r}", self._device.shares_memory)
        try:
            self.core = open_core(self._device, self._failures)
        except BaseException as error:
            raise self._not_started(error) from error
        _open.add(self)
        self._device.watch(self._give_up)
        self._device.run(self._run())
        self._started.wait()
        if self._failure is not None:
            self.close()
            raise self._not_started(self._failure) from self._failure

    def ask(self, action: Callable[[], None]) -> None:
        """Call a function on the worker's thread, between two steps. Raises as `check_usable`
        does."""
        self.check_usable()
        self._put(action)
        if self._is_closing:  # the worker may have looked into its inbox for the last time
            self._ended.wait()
            with self._fail_lock:
                self._fail_all()

    def tell(self, action: Callable[[], None]) -> None:
        """The same; nothing happens if the worker is closed, or in a forked child."""
        if not self._is_closing and os.getpid() == self._process_id:
            self._put(action)

    def ask_and_wait(self, action: Callable[[], None]) -> None:
        """`ask`, and return once the function has returned, or the worker has ended."""
        self.check_usable()
        done = threading.Event()

        def act() -> None:
            try:
                action()
            finally:
                done.set()

        self._put(act)
        while not done.wait(0.1) and not self._ended.is_set():
            pass

    @property
    def is_usable(self) -> bool:
        """Whether it takes new work."""
        return not (self._is_closing or self._is_draining)

    @property
    def num_requests(self) -> int:
        """Requests that run, wait, or are in the inbox."""
        return self.core.num_requests + len(self._inbox)

    def drain(self) -> None:
        """Take no new work, and wait until none is left."""
        self._is_draining = True
        if os.getpid() != self._process_id:
            return
        while self.num_requests:
            if self._ended.wait(0.005):
                break

    def close(self) -> None:
        """Stop after the current step, fail the requests that have not ended, free the device."""
        if os.getpid() != self._process_id:
            self._device.leak_in_child(self.core.runner)
            return
        if threading.get_ident() == self._thread_id:  # the engine was garbage collected here
            threading.Thread(target=self.close, name="sf_local-close").start()
            return
        with self._close_lock:
            if self._device is None:
                return
            self._is_closing = True
            self._device.worker.call_threadsafe(self._end_idling)
            self._ended.wait()
            self._close_device(self.core.runner)
            del self.core.runner
            self._device = None  # type: ignore[assignment]

    def _close_device(self, runner: ModelRunner) -> None:
        if not runner.has_ever_failed:
            runner.close()
            self._device.close()
        elif self._device.shares_memory:
            self._device.leak(runner)
        else:
            self._device.leak_and_park(runner)

    def check_process(self) -> None:
        """Raise EngineError in a forked child, which does not have the thread."""
        if os.getpid() != self._process_id:
            raise EngineError(
                "the engine belongs to the parent process and cannot be used after os.fork(); make "
                "a new one here, or use multiprocessing's spawn method"
            )

    def check_usable(self) -> None:
        """Raise EngineError in a forked child and once the engine is closed or closing, DeviceError
        once the device is lost."""
        self.check_process()
        if not self.is_usable:
            raise self._failures.closed(self._failure)

    def _put(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        if not self._is_closing:
            with contextlib.suppress(AttributeError):  # it closed meanwhile: nobody to wake
                self._device.worker.call_threadsafe(self._end_idling)

    def _not_started(self, error: BaseException) -> BaseException:
        """Close the device, and return the error to raise."""
        is_known = isinstance(error, SfLocalError) and not isinstance(error, DeviceError)
        if self._device is not None and (self._device.shares_memory or is_known):
            self._device.close()
        elif self._device is not None:
            self._device.leak_and_park(error)  # whose traceback holds what lies on it
        if is_known or not isinstance(error, Exception):
            return error
        return self._failures.lost("failed at start", error)

    # On the worker's thread

    async def _run(self) -> None:
        self._thread_id = threading.get_ident()
        try:
            await self.core.start()
            self._started.set()
            while not self._is_closing:
                started_at = time.perf_counter()
                self._do_what_was_asked()
                if not await self.core.step(started_at):
                    await self._wait_for_work()
        except BaseException as error:
            self._failure = error
        finally:
            self._end_all()

    def _give_up(self, error: DeviceError) -> None:
        """Fail everything from the device's watchdog, because the worker waits for ever."""
        self._thread_id = threading.get_ident()
        self.core.runner.has_ever_failed = True
        is_started = self._started.is_set()
        self._failure = self._failures.lost("failed", error) if is_started else error
        self._end_all()

    def _end_all(self) -> None:
        self._is_closing = True
        try:
            with self._fail_lock:
                self._fail_all()
        finally:
            self._ended.set()
            self._started.set()

    def _fail_all(self) -> None:
        while self._inbox:
            with contextlib.suppress(BaseException):
                self._do_what_was_asked()
        self.core.fail_all(lambda: self._failures.closed(self._failure))

    def _do_what_was_asked(self) -> None:
        while self._inbox:
            try:  # it stays in the inbox until it is done, so that `drain` sees it
                self._inbox[0]()
            finally:
                self._inbox.popleft()

    async def _wait_for_work(self) -> None:
        self._idle = self._device.worker.loop.create_future()
        if not (self._inbox or self._is_closing):
            await self._idle
        self._idle = None

    def _end_idling(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


_open: weakref.WeakSet[Worker[Any]] = weakref.WeakSet()


@atexit.register  # behind shortfin's own handler, so run before it; that one ends the threads
def _close_all() -> None:
    for worker in list(_open):
        worker.close()
