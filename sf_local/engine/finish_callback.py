"""FinishCallback: tells a user's function of every request that has ended."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from sf_local.engine.interrupts import Latch, start_thread
from sf_local.engine.log import log
from sf_local.errors import SfLocalError
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

OnFinish = Callable[[Output | SfLocalError, SamplingParams], object]
Calls = SimpleQueue[Callable[[], object] | None]


class FinishCallback:
    """Calls a function on a thread of its own, one call after another, so that no stream waits.

    The thread ends when this object is garbage collected. What the function raises is logged.
    """

    def __init__(self, function: OnFinish) -> None:
        self._function = function
        self._calls: Calls = SimpleQueue()
        self._process_id, self._thread_ids = os.getpid(), set[int]()
        start_thread(
            partial(_run, self._calls, self._thread_ids), "sf_local-on_finish", daemon=True
        )
        # Not at exit: the last requests end later than that
        weakref.finalize(self, self._calls.put, None).atexit = False
        _open.add(self)

    def __call__(self, result: Output | SfLocalError, params: SamplingParams) -> None:
        """Ask for a call; returns at once."""
        self._calls.put(partial(self._function, result, params))

    def flush(self) -> None:
        """Wait for the calls that were asked for. Returns at once in the function itself, and in a
        forked child, which does not have the thread."""
        if os.getpid() == self._process_id and threading.get_ident() not in self._thread_ids:
            done = Latch()
            self._calls.put(done.set)
            done.wait()


def _run(calls: Calls, thread_ids: set[int]) -> None:
    thread_ids.add(threading.get_ident())
    while (call := calls.get()) is not None:
        try:
            call()
        except BaseException:  # SystemExit as well: the next calls are others'
            log(logging.ERROR, "on_finish raised", exc_info=True)
        del call  # which holds an output


_open: weakref.WeakSet[FinishCallback] = weakref.WeakSet()


def flush_all() -> None:
    """Wait for the calls of all engines, at the end of the program."""
    for callback in list(_open):
        callback.flush()
