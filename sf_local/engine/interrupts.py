"""Threads and waiting that Ctrl-C may interrupt anywhere.

Signals reach only the main thread, where KeyboardInterrupt may raise between any two bytecodes. In
`Thread.start`, `Event` and `Future` it then leaves a lock locked, or RuntimeError takes its place.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from _thread import allocate_lock, start_new_thread  # also where they are replaced later
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from sf_local.errors import EngineError

LATEST = 0.5  # seconds until a signal is seen that arrived just before the main thread waited
LONGEST = 3600.0  # seconds of one wait elsewhere

T = TypeVar("T")


class Latch:
    """An event that is set once."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[threading.Lock] = []

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._is_set

    def set(self) -> None:
        """Set it. If this is interrupted, do it again: some may not have been woken."""
        self._is_set = True
        for waiter in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # it was released
                waiter.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or for `timeout` seconds; whether it is set."""
        ends_at = time.monotonic() + (math.inf if timeout is None else timeout)
        longest = LATEST if is_main_thread() else LONGEST
        waiter = allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        while not self._is_set and (left := ends_at - time.monotonic()) > 0:
            waiter.acquire(timeout=min(left, longest))
        self._waiters.remove(waiter)
        return self._is_set


def take(items: SimpleQueue[T]) -> T:
    """Wait for the queue's next item."""
    if not is_main_thread():
        return items.get()
    while True:
        with contextlib.suppress(Empty):
            return items.get(timeout=LATEST)


def check_threads() -> None:
    """Raise EngineError where greenlets stand for threads: a device's thread cannot wake them."""
    for waited_for in (type(threading.Lock()), queue.SimpleQueue):
        package = waited_for.__module__.partition(".")[0]
        if package in ("gevent", "eventlet"):
            raise EngineError(
                f"threads are replaced by {package}, whose greenlets a device cannot wake; leave "
                "threads as they are, by gevent.monkey.patch_all(thread=False, queue=False) or "
                "eventlet.monkey_patch(thread=False), and call the engine in their native threads "
                "(gevent.get_hub().threadpool, eventlet.tpool), or use it in another process"
            )


def is_main_thread() -> bool:
    """Whether signals interrupt the thread that calls this."""
    return threading.get_ident() == threading.main_thread().ident


def start_thread(target: Callable[[], None], name: str, *, daemon: bool) -> None:
    """Start a thread. Raises EngineError if the system allows no more of them."""
    thread = threading.Thread(target=target, name=name, daemon=daemon)

    def start() -> None:
        try:
            thread.start()
        except RuntimeError:  # it allows no other than the one that runs this
            target()

    try:
        start_new_thread(start, ())
    except RuntimeError as error:
        raise EngineError(
            "the system allows this process no more threads; end some of them, or raise its limit "
            "(ulimit -u, or pids.max of its cgroup)"
        ) from error


def uninterrupted(work: Callable[[], T]) -> T:
    """What `work` returns or raises.

    On the main thread, another one does it: KeyboardInterrupt raises here at once, and the work
    goes on to its end.
    """
    if not is_main_thread():
        return work()
    results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:
            results.put((None, error))

    start_thread(run, "sf_local-uninterrupted", daemon=False)
    result, error = take(results)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
