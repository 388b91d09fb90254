"""Worker: the thread of one device, which runs an engine core step by step.

Other threads put functions into its inbox, which it calls between two steps.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from sf_local.device.device import Device
from sf_local.engine.failures import Failures
from sf_local.engine.finish_callback import flush_all
from sf_local.engine.interrupts import Latch, check_threads, start_thread
from sf_local.engine.log import log
from sf_local.engine.trace_file import close_all
from sf_local.errors import DeviceError, EngineError, SfLocalError
from sf_local.model.runner import ModelRunner

SOON = 0.02  # seconds in which a caller that sends one request after the other sends the next


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

    def ask_ahead(self) -> bool:
        """While there is nothing to compute, have some of the memory that later steps will take, in
        a few milliseconds, for which a request that comes meanwhile waits; False if all is there.
        """

    def fail_all(self, make_error: Callable[[], SfLocalError]) -> None:
        """End every request with an error of its own."""


Core = TypeVar("Core", bound=Work)


class Worker(Generic[Core]):
    """Opens a device and runs a core on its thread until closed.

    Public methods may be called from any thread. Ctrl-C interrupts them at any moment, and may
    interrupt nothing that is done to the device, half of which cannot be undone: it is opened and
    closed on a thread of its own, as signals reach only the main one.
    """

    def __init__(
        self, device: str, open_core: Callable[[Device, Failures], Core],
        num_threads: int | None = None,
    ) -> None:  # fmt: skip
        """device: its name. open_core: makes the core on the open device, once. num_threads: of a
        CPU."""
        self._name, self._open_core, self._num_threads = device, open_core, num_threads
        self._inbox: deque[Callable[[], None]] = deque()
        self._called = Latch()  # what the thread waits on when it has no work
        self._is_closing = self._is_draining = False
        self._failure: BaseException | None = None
        self._started, self._ended = Latch(), Latch()
        self._asked_to_close, self._closed = Latch(), Latch()
        self._opener: dict[str, str] = {}  # filled once: what came first, `start` or `close`
        self._fail_lock = threading.Lock()
        self._failures = Failures(f"device={device!r}", shares_memory=device == "cpu")
        self._process_id = os.getpid()
        self._threads: set[int] = set()  # those that must not wait for its end
        self._device: Device = None  # type: ignore[assignment]  # until it is open

    def start(self) -> None:
        """Open the device and the core, and run it. Raises what `open_core` raises, and DeviceError
        for a device that fails; it is closed then. Close it if this is interrupted."""
        start_thread(self._own_device, "sf_local-device", daemon=True)
        self._started.wait()
        if self._failure is not None:
            self.close()
            raise self._failure

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
        """`ask`, and return once the function has returned or raised."""
        done = Latch()

        def act() -> None:
            try:
                action()
            finally:
                done.set()

        self.ask(act)
        done.wait()

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
        while self.num_requests and not self._ended.is_set():
            time.sleep(0.005)

    def ask_to_close(self) -> None:
        """Stop after the current step, fail the requests that have not ended, free the device; this
        does not wait for it."""
        if os.getpid() != self._process_id:
            return
        self._is_closing = True
        self._asked_to_close.set()
        if self._opener.setdefault("is", "close") == "close":
            self._closed.set()
        self._called.set()

    def close(self) -> None:
        """`ask_to_close`, and return when it is done."""
        self.ask_to_close()
        if os.getpid() == self._process_id and threading.get_ident() not in self._threads:
            self._closed.wait()  # else the engine was garbage collected on a thread of its own

    def leak(self) -> None:
        """Never free what lies on the device, in a forked child."""
        if self._device is not None:
            self._device.leak(self)

    def check_process(self) -> None:
        """Raise EngineError in a forked child, which does not have the thread, and among greenlets,
        which the thread cannot wake."""
        check_threads()
        if os.getpid() != self._process_id:
            raise EngineError(
                "the engine belongs to the parent process and cannot be used after os.fork(); make "
                "a new one here, or use multiprocessing's spawn method"
            )

    def check_usable(self) -> None:
        """Raise EngineError in a forked child, among greenlets, and once the engine is closed or
        closing; DeviceError once the device is lost."""
        self.check_process()
        if not self.is_usable:
            raise self._failures.closed(self._failure)

    def _put(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._called.set()

    # On the thread that opens and closes the device

    def _own_device(self) -> None:
        if self._opener.setdefault("is", "start") == "close":
            return
        _open.add(self)
        self._threads.add(threading.get_ident())
        try:
            self._open()
        except BaseException as error:
            is_open = self._device is not None
            self._failure = self._failures.at_start(error) if is_open else error
        else:
            self._asked_to_close.wait()
            self._ended.wait()
            self._close()
            log(logging.INFO, "closed device=%r", self._name)
        finally:
            _open.discard(self)
            self._ended.set()
            self._started.set()
            self._closed.set()

    def _open(self) -> None:
        self._device = Device(self._name, self._num_threads)
        try:
            self.core = self._open_core(self._device, self._failures)
        except BaseException as error:
            self._discard(error)
            raise
        self._device.watch(self._give_up)
        self._device.run(self._run())

    def _discard(self, error: BaseException) -> None:
        """Close a device on which no core could be opened."""
        if self._device.shares_memory or self._failures.is_known(error):
            self._device.close()
        else:
            self._device.leak_and_park(error)  # whose traceback holds what lies on it

    def _close(self) -> None:
        runner = self.core.runner
        if not runner.has_ever_failed:
            runner.close()
            self._device.close()
        elif self._device.shares_memory:
            self._device.leak(runner)
        else:
            self._device.leak_and_park(runner)
        del self.core.runner
        self._device = None  # type: ignore[assignment]

    # On the worker's thread

    async def _run(self) -> None:
        self._threads.add(threading.get_ident())
        try:
            await self.core.start()
            self._started.set()
            while not self._is_closing:
                started_at = time.perf_counter()
                self._do_what_was_asked()
                if await self.core.step(started_at) or self._wait_for_call(SOON):
                    continue
                while not self._is_called and self.core.ask_ahead():
                    pass  # until there is enough memory
                self._wait_for_call()
        except BaseException as error:
            is_started = self._started.is_set()
            self._failure = error if is_started else self._failures.at_start(error)
        finally:
            self._end_all()

    def _give_up(self, error: DeviceError) -> None:
        """Fail everything from the device's watchdog, because the worker waits for ever."""
        self._threads.add(threading.get_ident())
        self.core.runner.has_ever_failed = True
        what = "failed" if self._started.is_set() else "failed at start"
        self._failure = self._failures.lost(what, error)
        self._end_all()

    def _end_all(self) -> None:
        self._is_closing = True
        is_loss = self._failure is not None and self._started.is_set() and not self._ended.is_set()
        num_requests = self.num_requests
        try:
            with self._fail_lock:
                self._fail_all()
        finally:
            self._ended.set()
            self._started.set()
        if is_loss:
            error = self._failures.closed(self._failure)
            log(logging.WARNING, "%s (%d requests failed)", error, num_requests)

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

    @property
    def _is_called(self) -> bool:
        """Whether something was asked, or it is to close."""
        return bool(self._inbox) or self._is_closing

    def _wait_for_call(self, seconds: float | None = None) -> bool:
        """Wait until that is so, for so many seconds at most; the device has nothing to do."""
        self._called = Latch()
        return self._is_called or self._called.wait(seconds)


_open: set[Worker[Any]] = set()


def finish_closing() -> None:
    """Wait for the devices of workers that were asked to close, and whose memory is free then."""
    for worker in list(_open):
        if worker._asked_to_close.is_set():
            worker.close()


@atexit.register  # behind shortfin's own handler, so run before it; that one ends the threads
def _close_all() -> None:
    for worker in list(_open):
        while worker in _open:  # Ctrl-C must not leave it to shortfin
            with contextlib.suppress(KeyboardInterrupt):
                worker.close()
    flush_all()
    close_all()


def _leak_all() -> None:
    for worker in _open:
        worker.leak()
    _open.clear()


os.register_at_fork(after_in_child=_leak_all)
