"""Preparation: the threads in which an engine prepares the requests of asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from sf_local.engine.replicas import Replicas

T = TypeVar("T")
MAX_THREADS = 8  # more would keep the engine's own thread from Python's lock


class Preparation:
    """A few threads for what would hold up the event loop: long prompts, grammars, images.

    They are not those of `asyncio.to_thread`, all of which an app may keep busy, perhaps with work
    that waits for an answer. They end with this object, or with `close`.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas, self._process_id = replicas, os.getpid()
        self._threads = ThreadPoolExecutor(MAX_THREADS, "sf_local-prepare")

    async def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What `function(*arguments, **options)` returns or raises; raises EngineError or
        DeviceError without calling it if no device is usable, as in a forked child, which does not
        have the threads."""
        self._replicas.check_usable()
        call = partial(contextvars.copy_context().run, function, *arguments, **options)
        try:
            called = self._threads.submit(call)
        except RuntimeError:  # they have just been closed
            self._replicas.check_usable()
            raise
        return await asyncio.wrap_future(called)

    def close(self) -> None:
        """End the threads, once what they have begun is done; returns at once. Does nothing in a
        forked child, where their lock may be held for ever."""
        if os.getpid() == self._process_id:
            self._threads.shutdown(wait=False)
