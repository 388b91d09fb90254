"""Handles: how callers wait for a generation, in a thread or in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any

from sf_local.engine.generation import Generation
from sf_local.engine.interrupts import take
from sf_local.engine.replicas import Replicas
from sf_local.request.output import Delivery, Output


class Handle:
    """A generation under way. Iterate over text deltas, or wait for the whole `result()`.

    Dropping the handle, or leaving an iteration early, cancels the generation.
    """

    def __init__(self, engine: object, replicas: Replicas, generation: Generation) -> None:
        """Start the generation. engine: kept alive as long as the handle; raises EngineError or
        DeviceError if it is closed or lost."""
        self._engine, self._replicas, self._generation = engine, replicas, generation
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()
        self._output: Output | None = None
        generation.deliver = self._deliveries.put
        replicas.submit(generation)

    def __iter__(self) -> Iterator[str]:
        """Text deltas that concatenate to the result's text. Raises what ended the generation, if
        it failed."""
        return (text for text, _ in self.deltas() if text)

    def deltas(self) -> Iterator[tuple[str, Output | None]]:
        """Text deltas; the last one, which may be empty, comes with the output."""
        self._replicas.check_process()
        try:
            while self._output is None:
                item = take(self._deliveries)
                if isinstance(item, BaseException):
                    self._deliveries.put(item)  # for whoever asks again
                    raise item
                text, output = item
                if output is not None:
                    self._output = output
                    self._deliveries.put(("", output))  # for another thread that waits
                yield text, output
        finally:
            if self._output is None:
                self.cancel()

    def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        self._generation.is_streamed = False
        for _ in self:
            pass
        assert self._output is not None
        return self._output

    def cancel(self) -> None:
        """End the generation after the current step, with finish reason "abort"."""
        self._replicas.cancel(self._generation)

    def __del__(self) -> None:
        if getattr(self, "_output", self) is None:
            self.cancel()


class AsyncStream:
    """The text of a generation for asyncio, as it grows: `async for text in stream`.

    It begins with the first delta, or when it is awaited, which returns it and raises the mistakes
    that are found before the generation begins: `stream = await engine.astream(prompt)`. Dropping
    it, and cancelling a task that waits for it, cancel the generation.
    """

    def __init__(self, replicas: Replicas, prepare: Callable[[], Awaitable[Generation]]) -> None:
        self._replicas, self._prepare = replicas, prepare
        self._generation: Generation | None = None
        self._items: asyncio.Queue[Delivery] = asyncio.Queue()
        self._output: Output | None = None

    def __await__(self) -> Generator[Any, None, AsyncStream]:
        return self._started().__await__()

    async def _started(self, is_streamed: bool = True) -> AsyncStream:
        if self._generation is None:
            generation = await self._prepare()
            loop, put = asyncio.get_running_loop(), self._items.put_nowait
            # Raises if the event loop is closed by then, which ends the generation
            generation.deliver = lambda item: loop.call_soon_threadsafe(put, item)
            generation.is_streamed = is_streamed
            self._replicas.submit(generation)
            self._generation = generation
        return self

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        await self._started()
        while self._output is None:
            if text := await self._next():
                return text
        raise StopAsyncIteration

    async def _next(self) -> str:
        try:
            item = await self._items.get()
        except BaseException:
            await self.aclose()
            raise
        if isinstance(item, BaseException):
            self._items.put_nowait(item)  # for whoever asks again
            raise item
        text, self._output = item
        return text

    async def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        await self._started(is_streamed=False)
        while self._output is None:
            await self._next()
        return self._output

    async def aclose(self) -> None:
        """End the generation after the current step."""
        if self._generation is not None:
            self._replicas.cancel(self._generation)

    def __del__(self) -> None:
        if getattr(self, "_output", self) is None and self._generation is not None:
            self._replicas.cancel(self._generation)
