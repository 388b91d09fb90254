"""Engine: one model on one device, its loop on the device's worker thread, and handles to wait on.

The loop owns scheduler, pages and samplers; callers only put work on an inbox and read a queue, so
nothing here needs a lock. Mistakes of a caller raise in the caller's own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import os
import re
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from sf_local.artifact import Artifact, ModelConfig, check_target, open_artifact
from sf_local.device import Device, parse_device
from sf_local.errors import DeviceError, EngineError, RequestError
from sf_local.page_pool import PagePool
from sf_local.radix_cache import RadixCache
from sf_local.request import Request, RequestStatus, SamplingParams
from sf_local.runner import Logits, ModelRunner, Row
from sf_local.sampler import Sampler
from sf_local.scheduler import Chunk, Limits, Scheduler, Step
from sf_local.seams import SeamEncoder
from sf_local.tokenizer import Detokenizer, StopChecker, Tokenizer

MAX_DEFAULT_KV_BYTES = 1 << 30


@dataclass(frozen=True)
class Output:
    """A finished generation.

    text: without stop strings and special tokens. token_ids: all new tokens, the one that ended it
    included. finish_reason: "stop", "length", "abort" or "timeout"; matched: the stop text or token
    id. cached_tokens: of the prompt, found in the cache.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    matched: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    time_to_first_token: float  # seconds since submit
    latency: float  # seconds since submit


Delivery = tuple[str, Output | None] | BaseException


class Handle:
    """A generation under way. Iterate over text deltas, or wait for the whole `result()`.

    Dropping the handle, or leaving an iteration early, cancels the generation.
    """

    def __init__(self, engine: Engine, generation: _Generation) -> None:
        self._engine = engine  # which lives as long as its generations
        self._generation, self._loop = generation, engine._loop
        self._deliveries: SimpleQueue[Delivery] = SimpleQueue()
        self._output: Output | None = None
        generation.deliver = self._deliveries.put
        self._loop.submit(generation)

    def __iter__(self) -> Iterator[str]:
        """Text deltas that concatenate to the result's text."""
        return (text for text, _ in self.deltas() if text)

    def deltas(self) -> Iterator[tuple[str, Output | None]]:
        """Text deltas; the last one, which may be empty, comes with the output."""
        try:
            while self._output is None:
                item = self._deliveries.get()
                if isinstance(item, BaseException):
                    self._deliveries.put(item)  # for whoever asks again
                    raise item
                text, self._output = item
                if self._output is not None:
                    self._deliveries.put(("", self._output))  # for another thread that waits
                yield text, self._output
        finally:
            if self._output is None:
                self.cancel()

    def result(self) -> Output:
        """Wait for the end. Raises what ended the generation, if it failed."""
        for _ in self:
            pass
        assert self._output is not None
        return self._output

    def cancel(self) -> None:
        """End the generation after the current step, with reason "abort"."""
        self._loop.cancel(self._generation)

    def __del__(self) -> None:
        if getattr(self, "_output", self) is None:
            self.cancel()


class Engine:
    """Loads an artifact onto a device and serves generations until `shutdown()`.

    Args:
        vmfb: the artifact's folder, or its .vmfb file.
        device: "cpu", "hip" or "hip:N".
        config, parameters, tokenizer: files that do not lie beside the .vmfb.
        kv_pages: KV pages to allocate.
        kv_memory: the same as bytes, "2GiB", or "50%" of the free memory. By default one full
            context times the largest compiled batch, at most 1 GiB.

    Any number of generations run at once, from any thread. A generation depends only on its prompt
    and parameters, not on its company. Raises ArtifactError or DeviceError.
    """

    def __init__(
        self,
        vmfb: str | Path,
        device: str = "cpu",
        *,
        config: str | Path | None = None,
        parameters: str | Path | Sequence[str | Path] | None = None,
        tokenizer: str | Path | None = None,
        kv_pages: int | None = None,
        kv_memory: int | str | None = None,
    ) -> None:
        kind, _ = parse_device(device)
        self.artifact = open_artifact(
            vmfb, config=config, parameters=parameters, tokenizer=tokenizer
        )
        if self.artifact.manifest:
            check_target(self.artifact.manifest, kind)
        self.tokenizer = Tokenizer(self.artifact.tokenizer)
        num_pages = 1 + num_kv_pages(self.artifact.config, kv_pages, kv_memory)
        self._loop = _Loop(self.artifact, device, num_pages)
        self._finalizer = weakref.finalize(self, self._loop.close)
        self._eos_ids = _eos_ids(self.artifact, self.tokenizer)
        self._encode = SeamEncoder(self.tokenizer)
        page_size = self.artifact.config.page_size
        self.max_tokens = min(self.artifact.config.max_seq_len, (num_pages - 1) * page_size)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Handle:
        """Start a generation; raises RequestError for a prompt or parameters that cannot work."""
        return Handle(self, self._generation(prompt, params))

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Output:
        """The whole answer to a prompt, given as text or as token ids."""
        return self.submit(prompt, params).result()

    def samples(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> list[Output]:
        """`params.n` answers to one prompt, whose pages they share; seeds count up."""
        params = SamplingParams() if params is None else params
        seeds = [None if params.seed is None else params.seed + i for i in range(params.n)]
        handles = [self.submit(prompt, replace(params, seed=seed)) for seed in seeds]
        return [handle.result() for handle in handles]

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer's text, as it grows; mistakes raise here, not at the first delta."""
        return iter(self.submit(prompt, params))

    async def agenerate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Output:
        """`generate` for asyncio; cancelling the task cancels the generation."""
        async for _, output in self._adeltas(prompt, params):
            if output is not None:
                return output
        raise AssertionError("a generation ends with an output")

    async def astream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[str]:
        """`stream` for asyncio: `async for text in engine.astream(prompt)`."""
        async for text, _ in self._adeltas(prompt, params):
            if text:
                yield text

    async def _adeltas(
        self, prompt: str | Sequence[int], params: SamplingParams | None
    ) -> AsyncIterator[tuple[str, Output | None]]:
        generation = self._generation(prompt, params)
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Delivery]()

        def deliver(item: Delivery) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop may be closed by now
                loop.call_soon_threadsafe(items.put_nowait, item)

        generation.deliver = deliver
        self._loop.submit(generation)
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
                self._loop.cancel(generation)

    def warm(self, prompt: str) -> None:
        """A hint that prompts will begin so: compute it into the cache. Returns at once."""
        with contextlib.suppress(RequestError):
            self._loop.submit(self._generation(prompt, SamplingParams(max_new_tokens=0)))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what is going on.

        running, waiting: requests. pages_free, pages_used, pages_cached, pages_total: KV pages.
        prompt_tokens, cached_tokens, completion_tokens; hit_rate: share of prompt tokens that the
        cache had. preemptions, steps; step_seconds: time spent in steps, call_seconds of it inside
        the compiled functions.
        """
        return self._loop.stats()

    def flush_cache(self) -> None:
        """Free all pages that no request uses; returns when it is done."""
        self._loop.flush_cache()

    def shutdown(self, drain: bool = False) -> None:
        """End the loop thread and free the device.

        With `drain`, generations under way are finished first; else they fail. Later calls raise.
        """
        if drain:
            self._loop.drain()
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _generation(
        self, prompt: str | Sequence[int], params: SamplingParams | None
    ) -> _Generation:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params={params!r} must be SamplingParams")
        ids = self._prompt_ids(prompt)
        max_new_tokens = min(params.max_new_tokens, self.max_tokens - len(ids))
        request = Request(ids, params, max_new_tokens)
        generation = _Generation(request, self.tokenizer, self._eos_ids)
        if isinstance(prompt, str):
            generation.remember = functools.partial(self._encode.remember, prompt, ids)
        return generation

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self._encode(prompt)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"prompt={prompt!r} must be a str, or a list of token ids")
        else:
            ids = list(cast(Sequence[int], prompt))
        if not ids:
            raise RequestError("prompt is empty; give at least one token (a BOS, or a space)")
        manifest = self.artifact.manifest
        vocab_size = manifest.vocab_size if manifest else self.tokenizer.vocab_size
        for token in ids:
            is_id = isinstance(token, Integral) and not isinstance(token, bool)
            if not (is_id and 0 <= token < vocab_size):
                raise RequestError(
                    f"prompt: {token!r} is no token id; the model has 0 to {vocab_size - 1}"
                )
        if len(ids) >= self.max_tokens:
            raise RequestError(
                f"prompt: {len(ids)} tokens leave no room for an answer in a context of "
                f"{self.max_tokens}; shorten it, or raise kv_pages or the model's max_seq_len"
            )
        return ids


class _Generation:
    """A request with what turns its tokens into text; lives on the loop's thread."""

    deliver: Callable[[Delivery], None]
    remember: Callable[[Sequence[int], str], None] | None = None

    def __init__(self, request: Request, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self.request, params = request, request.params
        self.sampler = Sampler(params)
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._stops = StopChecker(params.stop)
        self._stop_ids = _stop_ids(params, tokenizer, eos_ids)
        self._text: list[str] = []
        self._last_delta = ""
        self._matched: str | int | None = None
        self._started_at = time.perf_counter()
        self._first_token_at = self._started_at
        self.deadline = None if params.timeout is None else self._started_at + params.timeout

    def accept(self, token: int) -> str | None:
        """Take a sampled token and deliver its text; the reason, if it ends the generation."""
        request = self.request
        if not request.output_ids:
            self._first_token_at = time.perf_counter()
        request.output_ids.append(token)
        if token in self._stop_ids:
            self._matched = self._stop_ids[token]
            return "stop"
        text, is_stopped = self._stops.push(self._detokenizer.push(token))
        reason = "stop" if is_stopped else None
        if reason is None and len(request.output_ids) >= request.max_new_tokens:
            reason = "length"
        self._text.append(text)
        if text and reason is None:
            self.deliver((text, None))
        elif text:
            self._last_delta = text
        return reason

    def finish(self, reason: str) -> None:
        """Deliver the text held back as one last delta, with the output."""
        tail = self._stops.push(self._detokenizer.flush())[0] + self._stops.flush()
        self._text.append(tail)
        if self._stops.matched is not None:
            reason, self._matched = "stop", self._stops.matched
        request, now = self.request, time.perf_counter()
        output = Output(
            text="".join(self._text),
            token_ids=request.output_ids,
            finish_reason=reason,
            matched=self._matched,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(request.output_ids),
            cached_tokens=request.num_cached or 0,
            time_to_first_token=self._first_token_at - self._started_at,
            latency=now - self._started_at,
        )
        if self.remember is not None and request.output_ids:
            self.remember(request.output_ids, output.text)
        self.deliver((self._last_delta + tail, output))


class _Loop:
    """Schedule, compute, sample, deliver; until closed. Runs on the device's worker thread."""

    def __init__(self, artifact: Artifact, device: str, num_pages: int) -> None:
        config = artifact.config
        self._pool = PagePool(num_pages)
        self._cache = RadixCache(self._pool, config.page_size)
        self._scheduler = Scheduler(self._pool, self._cache, _limits(artifact))
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads want done
        self._generations: dict[Request, _Generation] = {}
        self._deadlines: list[tuple[float, int, Request]] = []  # heap
        self._counters = dict.fromkeys(_COUNTERS, 0.0)
        self._idle: Any = None  # the future that the loop waits on when it has no work
        self._is_closing = False
        self._failure: BaseException | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._close_lock = threading.Lock()
        self._process_id, self._thread_id = os.getpid(), 0
        self._device = Device(device)
        try:
            self._runner = ModelRunner(artifact, self._device, num_pages)
        except BaseException:
            self._device.close()
            raise
        self._device.run(self._run())
        self._started.wait()
        if self._failure is not None:
            self.close()
            raise DeviceError(f"device={device!r} failed at start: {self._failure}")

    # Called from any thread

    def submit(self, generation: _Generation) -> None:
        self._check_usable()
        self._ask(lambda: self._take(generation))
        if self._ended.is_set():  # it closed meanwhile, and may not have seen the inbox
            with self._close_lock:
                self._fail_all()

    def cancel(self, generation: _Generation) -> None:
        if not self._is_closing and os.getpid() == self._process_id:
            self._ask(lambda: self._end(generation.request, "abort"))

    def flush_cache(self) -> None:
        self._check_usable()
        done = threading.Event()

        def flush() -> None:
            self._cache.evict(self._pool.num_cached)
            done.set()

        self._ask(flush)
        while not done.wait(0.1) and not self._ended.is_set():
            pass

    def drain(self) -> None:
        """Wait until no generation is left; new ones are still taken."""
        while self._generations or self._inbox:
            if self._ended.wait(0.005):
                break

    def stats(self) -> dict[str, float]:
        pool, scheduler, counters = self._pool, self._scheduler, dict(self._counters)
        prompt_tokens = counters["prompt_tokens"]
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "pages_free": pool.num_free,
            "pages_used": pool.num_used,
            "pages_cached": pool.num_cached,
            "pages_total": pool.num_pages - 1,
            **counters,
            "hit_rate": counters["cached_tokens"] / prompt_tokens if prompt_tokens else 0.0,
            "preemptions": scheduler.num_preemptions,
        }

    def close(self) -> None:
        """Stop after the current step, fail what is under way, free the device."""
        if os.getpid() != self._process_id:
            self._device.forget(self._runner)
            return
        if threading.get_ident() == self._thread_id:  # garbage collected on the loop's own thread
            threading.Thread(target=self.close, name="sf_local-close").start()
            return
        with self._close_lock:
            if self._device is None:
                return
            self._is_closing = True
            self._device.worker.call_threadsafe(self._end_idling)
            self._ended.wait()
            if self._runner.has_ever_failed:
                self._device.abandon(self._runner)
            else:
                self._runner.close()
                self._device.close()
            del self._runner
            self._device = None  # type: ignore[assignment]

    def _ask(self, action: Callable[[], None]) -> None:
        """Let the loop do something between two steps."""
        self._inbox.append(action)
        if not self._is_closing:
            self._device.worker.call_threadsafe(self._end_idling)

    def _check_usable(self) -> None:
        if os.getpid() != self._process_id:
            raise EngineError(
                "the engine belongs to the parent process and cannot be used after os.fork(); make "
                "a new one here, or use multiprocessing's spawn method"
            )
        if self._is_closing:
            cause = f": {self._failure}" if self._failure else ""
            raise EngineError(f"the engine is closed{cause}; make a new one")

    # On the loop's thread

    async def _run(self) -> None:
        self._thread_id = threading.get_ident()
        try:
            await self._runner.start()
            self._started.set()
            while not self._is_closing:
                started_at = time.perf_counter()
                self._do_what_was_asked()
                self._end_late_ones()
                step = self._scheduler.next_step()
                if step:
                    await self._execute(step)
                    seconds = time.perf_counter() - started_at
                    self._counters["steps"] += 1
                    self._counters["step_seconds"] += seconds
                    self._counters["call_seconds"] = self._runner.call_seconds
                else:
                    await self._wait_for_work()
        except BaseException as error:
            self._failure = error
        finally:
            self._is_closing = True
            self._fail_all()
            self._ended.set()
            self._started.set()

    async def _execute(self, step: Step) -> None:
        if step.copies:
            await self._runner.copy_pages(step.copies)
        await self._compute(self._runner.prefill, step.prefill)
        for group in step.decodes:
            await self._compute(self._runner.decode, group)

    async def _compute(
        self, call: Callable[[Sequence[Row]], Awaitable[Logits]], chunks: Sequence[Chunk]
    ) -> None:
        """One call for chunks of several requests; if it fails, they do, and no others."""
        chunks = [c for c in chunks if c.request.status is RequestStatus.RUNNING]
        if not chunks:
            return
        rows = [self._row(chunk) for chunk in chunks]
        try:
            logits = await call(rows)
        except Exception as error:
            await self._fail(chunks, error)
            return
        for chunk, row in zip(chunks, logits, strict=True):
            self._scheduler.computed(chunk)
            if chunk.end == chunk.request.num_tokens:
                self._sample(chunk.request, row)

    def _row(self, chunk: Chunk) -> Row:
        """A chunk with the pages that hold it and what comes before: attention reads no more."""
        request, page_size = chunk.request, self._cache.page_size
        pages = request.pages[: -(-chunk.end // page_size)]
        return Row(request.tokens(chunk.start, chunk.end), chunk.start, pages)

    def _sample(self, request: Request, logits: Any) -> None:
        generation = self._generations[request]
        if not request.output_ids:
            self._counters["prompt_tokens"] += len(request.prompt_ids)
            self._counters["cached_tokens"] += request.num_cached or 0
        if request.max_new_tokens == 0:
            self._end(request, "length")
            return
        try:
            reason = generation.accept(generation.sampler.sample(logits))
        except Exception as error:
            self._end(request, "abort", _step_error(error))
            return
        self._counters["completion_tokens"] += 1
        if reason:
            self._end(request, reason)

    async def _fail(self, chunks: Sequence[Chunk], error: Exception) -> None:
        """End the requests of a failed call; a broken device loses its pages, not its requests."""
        for chunk in chunks:
            self._end(chunk.request, "abort", _step_error(error))
        if self._runner.is_broken:
            await self._runner.recover()
            self._scheduler.reset()

    def _take(self, generation: _Generation) -> None:
        request = generation.request
        self._generations[request] = generation
        if generation.deadline is not None:
            heapq.heappush(self._deadlines, (generation.deadline, request.sequence, request))
            if len(self._deadlines) > 2 * len(self._generations) + 64:  # mostly of finished ones
                self._deadlines = [d for d in self._deadlines if d[2] in self._generations]
                heapq.heapify(self._deadlines)
        self._scheduler.add(request)

    def _end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """Finish a request, unless it is finished already."""
        generation = self._generations.pop(request, None)
        if generation is None:
            return
        self._scheduler.finish(request, reason)
        if error is None:
            generation.finish(reason)
        else:
            generation.deliver(error)

    def _do_what_was_asked(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _end_late_ones(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            self._end(heapq.heappop(self._deadlines)[2], "timeout")

    def _fail_all(self) -> None:
        self._do_what_was_asked()
        cause = f": {self._failure}" if self._failure else ""
        for request in list(self._generations):
            self._end(request, "abort", EngineError(f"the engine is closed{cause}; make a new one"))

    async def _wait_for_work(self) -> None:
        self._idle = self._device.worker.loop.create_future()
        if not (self._inbox or self._is_closing):
            await self._idle
        self._idle = None

    def _end_idling(self) -> None:
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


def _limits(artifact: Artifact) -> Limits:
    """Our own code starts anywhere; amdsharktank's at pages, or only at the beginning."""
    config = artifact.config
    sizes = config.prefill_batch_sizes, config.decode_batch_sizes
    if not config.has_prefill_position:
        return Limits(*sizes, prefill_tokens=config.max_seq_len, reuse="nothing")
    return Limits(*sizes, reuse="tokens" if artifact.manifest else "pages")


_COUNTERS = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "steps", "step_seconds", "call_seconds",
)  # fmt: skip


def _step_error(error: Exception) -> EngineError:
    failure = EngineError(f"the step failed: {error}")
    failure.__cause__ = error
    return failure


def _stop_ids(
    params: SamplingParams, tokenizer: Tokenizer, eos_ids: frozenset[int]
) -> dict[int, str | int]:
    """Tokens that end a generation, and what to report as matched.

    Special tokens never show in the text, so a stop string that is one is matched by its id.
    """
    ids: dict[int, str | int] = {} if params.ignore_eos else {i: i for i in eos_ids}
    ids |= {i: i for i in params.stop_token_ids}
    for stop in params.stop:
        token = tokenizer.token_id(stop)
        if token in tokenizer.special_ids:
            ids[token] = stop
    return ids


def num_kv_pages(config: ModelConfig, pages: int | None, memory: int | str | None) -> int:
    """How many pages to give out; raises RequestError for a size that cannot be had."""
    if pages is not None and memory is not None:
        raise RequestError(f"kv_pages={pages} and kv_memory={memory!r}: give one of them")
    available = _available_memory()
    if pages is None and memory is None:
        contexts = -(-config.max_seq_len // config.page_size) * config.decode_batch_sizes[-1]
        return max(1, min(contexts, MAX_DEFAULT_KV_BYTES // config.page_bytes))
    if pages is None:
        pages = _memory_bytes(memory, available) // config.page_bytes
        name, low = f"kv_memory={memory!r}", f"one page of {config.page_bytes} bytes"
    else:
        name, low = f"kv_pages={pages!r}", "1"
    if not isinstance(pages, int) or isinstance(pages, bool) or pages < 1:
        raise RequestError(f"{name} must be at least {low}")
    if pages * config.page_bytes > available:
        raise RequestError(
            f"{name}: {pages * config.page_bytes / 2**30:.1f} GiB of KV pages, but "
            f"{available / 2**30:.1f} GiB are free; use at most {available // config.page_bytes} "
            "pages"
        )
    return pages


def _memory_bytes(memory: int | str | None, available: int) -> int:
    """Bytes of 1073741824, "1GiB", "512MiB" or "50%"."""
    if isinstance(memory, int) and not isinstance(memory, bool):
        return memory
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]iB|B)", str(memory).strip())
    if not match:
        raise RequestError(f'kv_memory={memory!r} must be bytes, "2GiB", "512MiB" or "50%"')
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return int(available * number / 100)
    return int(number * 1024 ** "BKMGT".index(unit[0]))


def _available_memory() -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates it."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else sys.maxsize


def _eos_ids(artifact: Artifact, tokenizer: Tokenizer) -> frozenset[int]:
    if artifact.manifest:
        return frozenset(artifact.manifest.eos_token_ids)
    return frozenset([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
