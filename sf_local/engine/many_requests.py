"""Many requests at once: those of a list, or of an iterable of any length within a window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import islice
from numbers import Integral
from queue import SimpleQueue
from typing import Any, cast

from tqdm import tqdm

from sf_local.engine.generation import Generation
from sf_local.engine.interrupts import take
from sf_local.engine.replicas import Replicas
from sf_local.errors import RequestError
from sf_local.request.output import Delivery, Output
from sf_local.request.prompt import Prompt

Make = Callable[[Any, Any], Generation]  # of a prompt or messages, and parameters
WINDOWS = 4  # what is read ahead to be sorted, in max_in_flight


def is_batch(prompt: object) -> bool:
    """Whether a prompt is a list of prompts: of texts, lists of token ids, or prepared prompts."""
    return isinstance(prompt, list | tuple) and not (prompt and isinstance(prompt[0], Integral))


def is_chat_batch(messages: object) -> bool:
    """Whether messages are a list of chats."""
    return isinstance(messages, list | tuple) and (
        not messages or isinstance(messages[0], list | tuple)
    )


def is_messages(item: object) -> bool:
    """Whether an item is a chat, and not a prompt."""
    return isinstance(item, list | tuple) and bool(item) and not isinstance(item[0], Integral)


def run_all(
    replicas: Replicas, make: Make, items: Sequence[Any], params: object, return_exceptions: bool
) -> list[Output | Exception]:
    """Answers to all items, in their order, with every request in flight at once.

    params: of each, or a list of as many. Raises what one item raises, once the others are
    cancelled; with `return_exceptions` that stands in its place.
    """
    each = _params_of(params, len(items))
    running = _Running(replicas)
    results: dict[int, Output | Exception] = {}
    try:
        for index, item in enumerate(items):
            if not running.start(index, partial(make, item, each[index])) and not return_exceptions:
                break  # which is raised below
        for index, result in running:
            _check(result, return_exceptions)
            results[index] = result
    finally:
        running.cancel()
    return [results[index] for index in range(len(items))]


def run_lazily(
    replicas: Replicas,
    make: Make,
    items: Iterable[Any],
    *,
    ordered: bool,
    progress: bool,
    max_in_flight: int,
    return_exceptions: bool,
) -> Iterator[Output | Exception]:
    """Answers to items that are read as there is room for them, as `Engine.map` describes."""
    running, total = _Running(replicas), len(items) if isinstance(items, Sized) else None
    bar = tqdm(total=total, unit=" requests", disable=None if progress else True)
    waiting = _by_prefix(items, WINDOWS * max_in_flight)
    results = _results(running, make, waiting, max_in_flight)
    counted = _counted(results, bar)
    try:
        for result in _in_order(counted) if ordered else counted:
            _check(result, return_exceptions)
            yield result
    finally:
        running.cancel()
        bar.close()


def _counted(results: Iterable[Output | Exception], bar: Any) -> Iterator[Output | Exception]:
    """The results, while a progress bar shows how many there are and the speed of their tokens."""
    started_at, tokens = time.perf_counter(), 0
    for result in results:
        tokens += getattr(result, "completion_tokens", 0)
        speed = tokens / (time.perf_counter() - started_at)
        bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        bar.update()
        yield result


def _results(
    running: _Running, make: Make, waiting: Iterator[tuple[int, Any]], most: int
) -> Iterator[Output | Exception]:
    for index, item in islice(waiting, most):
        running.start(index, partial(make, item, None))
    for _, result in running:
        for index, item in islice(waiting, 1):
            running.start(index, partial(make, item, None))
        yield result


def _in_order(results: Iterable[Output | Exception]) -> Iterator[Output | Exception]:
    early: dict[int, Output | Exception] = {}
    number = 0
    for result in results:
        early[cast(int, getattr(result, "index", None))] = result
        while number in early:
            yield early.pop(number)
            number += 1


def _by_prefix(items: Iterable[Any], size: int) -> Iterator[tuple[int, Any]]:
    """Items with their numbers; within each window of `size` those with a common beginning stand
    together, so that the prefix cache still has it. SGLang's schedulers have the idea."""
    numbered = enumerate(items)
    while window := list(islice(numbered, size)):
        yield from sorted(window, key=lambda pair: beginning(pair[1]))


def beginning(item: object) -> tuple[int, Any]:
    """What prompts or messages are sorted by: their text, or their token ids."""
    if isinstance(item, Prompt):
        item = item.ids
    if isinstance(item, Sequence) and not isinstance(item, str):
        if all(isinstance(token, int) for token in item):
            return 1, list(item)
        return 0, "\n".join(map(_message_text, item))
    return 0, str(item)


def _message_text(message: object) -> str:
    if isinstance(message, Mapping):
        return f"{message.get('role')} {message.get('content')}"
    return str(message)


class _Running:
    """Requests under way; iterates over what they end with, until none is left."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._ended: SimpleQueue[tuple[int, Delivery]] = SimpleQueue()
        self._generations: dict[int, Generation | None] = {}

    def start(self, index: int, make: Callable[[], Generation]) -> bool:
        """Start a request; False if it is refused, and that is what it ends with."""
        self._generations[index] = None
        try:
            generation = make()
            generation.deliver = lambda item: self._ended.put((index, item))
            self._replicas.submit(generation)
            self._generations[index] = generation
        except Exception as error:
            self._ended.put((index, error))
            return False
        return True

    def __iter__(self) -> Iterator[tuple[int, Output | Exception]]:
        while self._generations:
            index, item = take(self._ended)
            del self._generations[index]
            if isinstance(item, BaseException):
                if not isinstance(item, Exception):
                    raise item
                item.index = index  # type: ignore[attr-defined]
                yield index, item
            elif item[1] is not None:
                yield index, replace(item[1], index=index)

    def cancel(self) -> None:
        """End what is still under way."""
        for generation in self._generations.values():
            if generation is not None:
                self._replicas.cancel(generation)


def _check(result: Output | Exception, return_exceptions: bool) -> None:
    """Raise what an item ended with, with its number if it was refused; unless errors are kept."""
    if return_exceptions or not isinstance(result, Exception):
        return
    if not isinstance(result, RequestError):
        raise result
    index = result.index  # type: ignore[attr-defined]
    error = type(result)(f"index {index}: {result}").with_traceback(result.__traceback__)
    error.index = index  # type: ignore[attr-defined]
    raise error from result.__cause__


def _params_of(params: object, count: int) -> Sequence[Any]:
    """Parameters of each of `count` items."""
    if not isinstance(params, list | tuple):
        return [params] * count
    if len(params) != count:
        raise RequestError(f"params: {len(params)} of them for {count} items; give one, or as many")
    return params
