"""Handles: how callers wait for a generation, in a thread or in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from sf_local.engine.generation import Generation
from sf_local.engine.interrupts import take
from sf_local.engine.replicas import Replicas
from sf_local.request.checks import check_float
from sf_local.request.output import Delivery, Delta, Output, ToolCall

T = TypeVar("T")
if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    # What a stream yields: text, and for chats calls of tools as well
    Item = TypeVarWithDefault("Item", default=str)
else:
    Item = TypeVar("Item")


class Handle(Generic[Item]):
    """A generation under way. Iterate over text deltas, or wait for the whole `result()`.

    Dropping the handle, or leaving an iteration early, cancels the generation.
    """

    def __init__(self, engine: object, replicas: Replicas, generation: Generation) -> None:
        """Start the generation. engine: kept alive as long as the handle; raises EngineError or
        DeviceError if it is closed or lost."""
        self._engine, self._replicas, self._generation = engine, replicas, generation
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()
        self._is_read = False
        generation.deliver = self._deliveries.put
        replicas.submit(generation)

    def __iter__(self) -> Stream[Item]:
        """Text deltas that concatenate to the result's text. Raises what ended the generation, if
        it failed."""
        return Stream(self)

    def deltas(self) -> Iterator[tuple[str | Delta, Output | None]]:
        """New text, or what is new of a chat that may call tools or reason; the last one, which may
        be empty, comes with the output."""
        self._replicas.check_process()
        self._generation.is_streamed = True
        try:
            while not self._is_read:
                item = take(self._deliveries)
                if isinstance(item, BaseException):
                    self._deliveries.put(item)  # for whoever asks again
                    raise item
                text, output = item
                if output is not None:
                    self._is_read = True
                    self._deliveries.put(("", output))  # for another thread that waits
                yield text, output
        finally:
            self.cancel()

    def result(self, timeout: float | None = None) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed.

        timeout: seconds, after which this raises TimeoutError. The generation goes on then: ask
        again, iterate, or cancel it. (`SamplingParams.timeout` ends the generation itself.)
        """
        if timeout is not None:
            timeout = check_float("timeout", timeout, 0.0, float("inf"))
        self._replicas.check_process()
        try:
            has_ended = self._generation.ended.wait(timeout)
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        if not has_ended:
            raise TimeoutError(f"timeout={timeout}: the generation has not ended, and goes on")
        return self._generation.output()

    def done(self) -> bool:
        """Whether the generation has ended, so that `result` returns or raises at once. Raises
        EngineError in a forked child, where none ends."""
        self._replicas.check_process()
        return self._generation.ended.is_set()

    @property
    def num_prompt_tokens(self) -> int:
        """The length of the prompt, images included."""
        return len(self._generation.request.prompt_ids)

    def add_done_callback(self, callback: Callable[[Handle[Item]], object]) -> None:
        """Call a function with this handle once the generation has ended, as a Future does.

        It is called on the thread of the device, so it must be short, such as a queue's `put`; what
        it raises is dropped. The engine keeps the handle until then.
        """
        self._generation.when_ended(lambda: callback(self))

    @property
    def output(self) -> Output | None:
        """The result, with finish reason and numbers of tokens, once the generation has ended; None
        before, and if it failed."""
        result = self._generation.result
        return result if isinstance(result, Output) else None

    def cancel(self) -> None:
        """End the generation after the current step, with finish reason "abort"."""
        if not self._generation.ended.is_set():
            self._replicas.cancel(self._generation)

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self.cancel()


class Stream(Iterator[Item]):
    """The text of a generation, as it grows: `for text in stream`. Dropping it cancels the
    generation.

    Of a chat with tools, a ToolCall as well, when it is whole.
    """

    def __init__(self, handle: Handle[Item]) -> None:
        self._handle = handle
        self._items = (item for new, _ in handle.deltas() for item in _items(new))

    def __next__(self) -> Item:
        return cast(Item, next(self._items))

    @property
    def output(self) -> Output | None:
        """As `Handle.output`: the whole result, once the stream has ended."""
        return self._handle.output

    def close(self) -> None:
        """End the generation after the current step."""
        self._handle.cancel()


class AsyncStream(Generic[Item]):
    """A generation for asyncio: `async for text in stream`, or `await stream.result()`.

    It begins with the first delta, or when it is awaited, which returns it and raises the mistakes
    that are found before the generation begins: `stream = await engine.astream(prompt)`. Dropping
    it, and cancelling a task that waits for it, cancel the generation.
    """

    def __init__(self, replicas: Replicas, prepare: Callable[[], Awaitable[Generation]]) -> None:
        self._replicas, self._prepare = replicas, prepare
        self._generation: Generation | None = None
        self._starting, self._ended = asyncio.Lock(), asyncio.Event()
        self._items: asyncio.Queue[Delivery] = asyncio.Queue()
        self._new: list[str | ToolCall] = []  # taken out of the queue, for the next ones
        self._is_read = False

    def __await__(self) -> Generator[Any, None, AsyncStream[Item]]:
        yield from self._started().__await__()
        return self

    async def _started(self) -> Generation:
        async with self._starting:  # several tasks may wait for it
            if self._generation is None:
                generation = await self._prepare()
                generation.deliver = _deliver_to(self._items, self._ended)
                self._replicas.submit(generation)
                self._generation = generation
            return self._generation

    def __aiter__(self) -> AsyncStream[Item]:
        return self

    async def __anext__(self) -> Item:
        generation = self._generation or await self._started()
        generation.is_streamed = True
        while not (self._new or self._is_read):
            item = await self._waited(self._items.get())
            if isinstance(item, BaseException):
                self._items.put_nowait(item)  # for whoever asks again
                raise item
            text, output = item
            if output is not None:
                self._is_read = True
                self._items.put_nowait(("", output))  # for another task that waits
            self._new = _items(text)
        if self._new:
            return cast(Item, self._new.pop(0))
        raise StopAsyncIteration

    async def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        generation = await self._started()
        await self._waited(self._ended.wait())
        return generation.output()

    async def _waited(self, event: Awaitable[T]) -> T:
        try:
            return await event
        except BaseException:
            self.cancel()
            raise

    def done(self) -> bool:
        """Whether the generation has ended, so that `result` need not wait for it."""
        return self._generation is not None and self._generation.ended.is_set()

    @property
    def output(self) -> Output | None:
        """As `Handle.output`: the whole result, once the generation has ended."""
        result = self._generation and self._generation.result
        return result if isinstance(result, Output) else None

    def cancel(self) -> None:
        """End the generation after the current step, with finish reason "abort"."""
        if self._generation is not None and not self.done():
            self._replicas.cancel(self._generation)

    async def aclose(self) -> None:
        """The same, for `contextlib.aclosing`."""
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self.cancel()


def _items(new: str | Delta) -> list[str | ToolCall]:
    """What a stream yields: text, and calls that became whole."""
    delta = Delta(new) if isinstance(new, str) else new
    return [*filter(None, [delta.text]), *delta.tool_calls]


def _deliver_to(
    items: asyncio.Queue[Delivery], ended: asyncio.Event
) -> Callable[[Delivery], object]:
    """What delivers from another thread to the event loop that runs here. It does not keep a stream
    alive, and raises if the event loop is closed by then, which ends the generation."""
    loop = asyncio.get_running_loop()

    def receive(item: Delivery) -> None:
        items.put_nowait(item)
        if isinstance(item, BaseException) or item[1] is not None:
            ended.set()

    return lambda item: loop.call_soon_threadsafe(receive, item)
