"""Handles: how callers wait for a generation, in a thread or in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from queue import SimpleQueue

from sf_local.engine.generation import Generation
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
                item = self._deliveries.get()
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


async def deltas(
    replicas: Replicas, generation: Generation
) -> AsyncIterator[tuple[str, Output | None]]:
    """Start a generation; its text deltas on the running event loop, the last one with the output.

    Leaving the iteration early, and cancelling its task, cancel the generation.
    """
    loop, items = asyncio.get_running_loop(), asyncio.Queue[Delivery]()

    def deliver(item: Delivery) -> None:
        """Raises if the event loop is closed by now, which ends the generation."""
        loop.call_soon_threadsafe(items.put_nowait, item)

    generation.deliver = deliver
    replicas.submit(generation)
    output = None
    try:
        while output is None:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            text, output = item
            yield text, output
    finally:
        if output is None:
            replicas.cancel(generation)
