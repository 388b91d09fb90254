"""Loop: schedule, compute, sample, deliver, on the device's worker thread.

It alone owns scheduler, pages and samplers; other threads only put work on its inbox, so nothing
here needs a lock.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.open import REPAIR, Artifact
from sf_local.device.device import Device, reason
from sf_local.errors import DeviceError, EngineError, SfLocalError
from sf_local.engine.generation import Generation
from sf_local.grammar.mask import Masks
from sf_local.kv_cache.page_pool import PagePool
from sf_local.vision.reader import Span, Tile
from sf_local.kv_cache.radix_cache import RadixCache
from sf_local.request.request import Request, RequestStatus
from sf_local.model.runner import ModelRunner, Row, Wanted
from sf_local.sampling.sampler import Sampled, sample
from sf_local.engine.scheduler import Chunk, Limits, Scheduler, Step
from sf_local.sampling.logits import Next, WrongLogits, find_wrong, summarize

_COUNTERS = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "forced_tokens", "steps",
    "step_seconds", "call_seconds", "mask_seconds", "sample_seconds", "encoded_tiles",
    "encode_seconds",
)  # fmt: skip


_open: weakref.WeakSet[Loop] = weakref.WeakSet()


def _close_all() -> None:
    for loop in list(_open):
        loop.close()


# Registered after shortfin's own handler, so run before it; that one ends the loop's thread.
atexit.register(_close_all)


class Loop:
    """Schedule, compute, sample, deliver; until closed. Runs on the device's worker thread."""

    def __init__(self, artifact: Artifact, device: str, num_pages: int) -> None:
        config = artifact.config
        self._pool = PagePool(num_pages)
        self._cache = RadixCache(self._pool, config.page_size)
        limits = _limits(artifact)
        self._scheduler = Scheduler(self._pool, self._cache, limits)
        self._can_jump = limits.reuse == "tokens"  # compute several tokens from anywhere
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads want done
        self._generations: dict[Request, Generation] = {}
        self._unwritten: list[Generation] = []  # their new text is delivered beside the next call
        self._deadlines: list[tuple[float, int, Request]] = []  # heap
        self._counters = dict.fromkeys(_COUNTERS, 0.0)
        self._idle: Any = None  # the future that the loop waits on when it has no work
        self._is_closing = self._is_draining = False
        self._failure: BaseException | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._close_lock, self._fail_lock = threading.Lock(), threading.Lock()
        self._process_id, self._thread_id = os.getpid(), 0
        self._name = f"device={device!r}"
        self._vocab_size = artifact.manifest.vocab_size if artifact.manifest else None
        self._device = Device(device)
        try:
            self._runner = ModelRunner(artifact, self._device, num_pages)
        except BaseException as error:
            raise self._not_started(error) from error
        _open.add(self)
        self._device.watch(self._give_up)
        self._device.run(self._run())
        self._started.wait()
        if self._failure is not None:
            self.close()
            raise self._not_started(self._failure) from self._failure

    # Called from any thread

    def submit(self, generation: Generation) -> None:
        self.check_usable()
        self._ask(lambda: self._take(generation))
        if self._is_closing:  # it may not have seen the inbox any more
            self._ended.wait()
            with self._fail_lock:
                self._fail_all()

    def cancel(self, generation: Generation) -> None:
        if not self._is_closing and os.getpid() == self._process_id:
            self._ask(lambda: self._end(generation.request, "abort"))

    def flush_cache(self) -> None:
        self.check_usable()
        done = threading.Event()

        def flush() -> None:
            try:
                self._cache.evict(self._pool.num_cached)
            finally:
                done.set()

        self._ask(flush)
        while not done.wait(0.1) and not self._ended.is_set():
            pass

    @property
    def is_usable(self) -> bool:
        return not (self._is_closing or self._is_draining)

    @property
    def num_requests(self) -> int:
        """Those that run, wait, or are about to."""
        return len(self._generations) + len(self._inbox)

    def drain(self) -> None:
        """Take no new generations, and wait until none is left."""
        self._is_draining = True
        if os.getpid() != self._process_id:
            return
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
            if self._runner.has_ever_failed and not self._device.shares_memory:
                self._device.lose(self._runner)
            elif self._runner.has_ever_failed:
                self._device.abandon(self._runner)
            else:
                self._runner.close()
                self._device.close()
            del self._runner
            self._device = None  # type: ignore[assignment]

    def _not_started(self, error: BaseException) -> BaseException:
        """The error to raise, once the device is out of the way."""
        is_known = isinstance(error, SfLocalError) and not isinstance(error, DeviceError)
        if self._device is not None and (self._device.shares_memory or is_known):
            self._device.close()
        elif self._device is not None:
            self._device.lose(error)  # whose traceback holds what lies on it
        if is_known or not isinstance(error, Exception):
            return error
        return self._lost("failed at start", error)

    def _lost(self, what: str, error: BaseException) -> DeviceError:
        text = reason(error)
        remedy = " with a smaller kv_memory" if "OutOfMemory" in text else ""
        lost = DeviceError(
            f"{self._name} {what}: {text}; it is lost to this process: start the program "
            f"again{remedy}, or make an engine with device='cpu'"
        )
        lost.__cause__ = error
        return lost

    def _closed(self) -> SfLocalError:
        if isinstance(self._failure, DeviceError) and self._failure.__cause__ is not None:
            return self._lost("failed", self._failure.__cause__)
        cause = f": {reason(self._failure)}" if self._failure else ""
        return EngineError(f"the engine is closed{cause}; make a new one")

    def _ask(self, action: Callable[[], None]) -> None:
        """Let the loop do something between two steps."""
        self._inbox.append(action)
        if not self._is_closing:
            with contextlib.suppress(AttributeError):  # it closed meanwhile: nobody to wake
                self._device.worker.call_threadsafe(self._end_idling)

    def check_process(self) -> None:
        """Raise EngineError in a forked child: the thread is not there."""
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
            raise self._closed()

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
                    self._write()
                    await self._wait_for_work()
        except BaseException as error:
            self._failure = error
        finally:
            self._end_all()

    def _give_up(self, error: DeviceError) -> None:
        """In the place of a worker that waits for ever."""
        self._thread_id = threading.get_ident()
        self._runner.has_ever_failed = True
        self._failure = self._lost("failed", error) if self._started.is_set() else error
        self._end_all()

    def _end_all(self) -> None:
        self._is_closing = True
        try:
            with self._fail_lock:
                self._fail_all()
        finally:
            self._ended.set()
            self._started.set()

    async def _execute(self, step: Step) -> None:
        if step.copies:
            try:
                await self._runner.copy_pages(step.copies)
            except Exception as error:
                started = {destination for _, destination in step.copies}
                await self._fail([r for r in self._generations if started & {*r.pages}], error)
                return
        for group in step.prefills:
            await self._compute(self._prefill, await self._seen(group))
        for group in step.decodes:
            await self._compute(self._decode, group)

    async def _prefill(self, chunks: Sequence[Chunk], rows: list[Row], wanted: Wanted) -> Next:
        """What follows each chunk; generations that want all logits get them as well."""
        if not any(_wants_logits(chunk) for chunk in chunks):
            return await self._runner.prefill(rows, wanted)
        logits = await self._runner.prefill_all(rows, wanted)
        for chunk, values in zip(chunks, logits, strict=True):
            generation = self._generations.get(chunk.request)
            if generation is not None and _wants_logits(chunk):
                with self._ending(chunk.request):
                    generation.take_logits(chunk.start, values)
                if chunk.end >= len(chunk.request.prompt_ids):
                    chunk.request.first_logits = None
        return summarize(np.stack([values[-1] for values in logits]), wanted.scales_of(len(rows)))

    async def _decode(self, _: Sequence[Chunk], rows: list[Row], wanted: Wanted) -> Next:
        return await self._runner.decode(rows, wanted)

    async def _compute(
        self,
        call: Callable[[Sequence[Chunk], list[Row], Wanted], Awaitable[Next]],
        chunks: Sequence[Chunk],
    ) -> None:
        """One call for chunks of several requests; if it fails, they do, and no others.

        A request ends alone if what the call returned for it is wrong.
        """
        chunks = _running(chunks)
        if not chunks:
            return
        chunks.sort(key=self._needs_logits, reverse=True)
        generations = [self._generations[chunk.request] for chunk in chunks]
        samplers = [generation.sampler for generation in generations]
        grammars = [generation.grammar for generation in generations]
        are_last = [_is_last(chunk) for chunk in chunks]
        needed = [a and s.needs_mask for a, s in zip(are_last, samplers, strict=True)]
        masks = Masks(grammars, needed)
        wanted = Wanted(
            [sampler.scale for sampler in samplers],
            num_logits=sum(map(self._needs_logits, chunks)),
            copy=False,
            meanwhile=lambda: self._work_beside(masks),
        )
        try:
            rows = [self._row(chunk) for chunk in chunks]
            following = await call(chunks, rows, wanted)
        except Exception as error:
            await self._fail([chunk.request for chunk in chunks], error)
            return
        wrong = find_wrong(following, self._vocab_size)
        for i, what in wrong.items():
            failure = self._returned(f"{what} after position {chunks[i].end - 1}")
            self._end(chunks[i].request, "abort", failure)
        for chunk in chunks:
            self._scheduler.computed(chunk)
        last = [c.request if a else None for c, a in zip(chunks, are_last, strict=True)]
        self._sample(last, following, masks)
        if wrong:
            await self._clear([chunks[i] for i in wrong], [rows[i] for i in wrong])

    async def _clear(self, chunks: Sequence[Chunk], rows: Sequence[Row]) -> None:
        """Clear what a call wrote for requests that have ended because it was wrong.

        Keys and values may be NaN where logits are, and those pages will be others': attention
        multiplies what it masks by zero, and NaN survives that. So may page 0, of padding.
        """
        size, pages = self._cache.page_size, [0]
        for chunk, row in zip(chunks, rows, strict=True):
            pages += row.page_ids[chunk.start // size :]
        self._cache.forget(pages)
        try:
            await self._runner.clear_pages(pages)
        except Exception as error:
            await self._fail([], error)

    async def _seen(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks whose images are encoded: a batch of tiles each step; others decode between."""
        running = _running(chunks)
        tiles = _unseen(running)
        if tiles:
            self._write()  # others' text need not wait for it
            try:
                await self._encode(dict(islice(tiles.items(), self._runner.max_tiles)))
            except Exception as error:
                await self._fail([c.request for c in running if _unseen([c])], error)
        return [chunk for chunk in running if not _unseen([chunk])]

    async def _encode(self, tiles: dict[Tile, NDArray[np.uint8]]) -> None:
        """Keep the embeddings of tiles; those that are wrong end the requests that show them."""
        started_at = time.perf_counter()
        embeds = await self._runner.encode(list(tiles.values()))
        self._counters["encode_seconds"] += time.perf_counter() - started_at
        for tile, values in zip(tiles, embeds, strict=True):
            if np.isfinite(values).all():
                tile.embeds, tile.pixels = values, None
                continue
            error = self._returned("NaN or infinity among the embeddings of an image")
            for request in list(self._generations):
                if any(span.tile is tile for span in request.spans):
                    self._end(request, "abort", error)
        self._counters["encoded_tiles"] += len(tiles)

    def _needs_logits(self, chunk: Chunk) -> bool:
        """Whether the best token is not enough to go on from a chunk."""
        return _is_last(chunk) and not self._generations[chunk.request].takes_the_best

    def _work_beside(self, masks: Masks) -> None:
        """What the host does while the device computes: the last step's text, this one's masks."""
        self._write()
        masks.fill()

    def _write(self) -> None:
        for generation in self._unwritten:
            with self._ending(generation.request):
                generation.write()
        self._unwritten.clear()

    def _row(self, chunk: Chunk) -> Row:
        """A chunk with the pages that hold it and what comes before: attention reads no more."""
        request, page_size = chunk.request, self._cache.page_size
        pages = request.pages[: -(-chunk.end // page_size)]
        return Row(request.tokens(chunk.start, chunk.end), chunk.start, pages, _spans(chunk))

    def _sample(self, requests: Sequence[Request | None], following: Next, masks: Masks) -> None:
        """The next token of those requests whose last token is computed; None for the others."""
        rows, generations = [], []
        for i, request in enumerate(requests):
            generation = None if request is None else self._generations.get(request)
            if request is None or generation is None:  # it ended during the call
                continue
            self._count_prompt(generation)
            if request.max_new_tokens == 0:
                self._end(request, "length")
            elif i in masks.errors:
                self._end(request, "abort", self._failure_of(masks.errors[i]))
            elif not self._jump(generation):
                rows.append(i)
                generations.append(generation)
        if not rows:
            return
        started_at = time.perf_counter()
        if len(rows) < len(requests):
            following = following.take(rows)
        samplers = [generation.sampler for generation in generations]
        sampled = sample(samplers, following, [masks.rows[i] for i in rows])
        self._counters["mask_seconds"] += masks.seconds
        self._counters["sample_seconds"] += time.perf_counter() - started_at
        for generation, choice in zip(generations, sampled, strict=True):
            if isinstance(choice, Sampled):
                self._accept(generation, choice)
            else:
                self._end(generation.request, "abort", self._failure_of(choice))

    def _accept(self, generation: Generation, sampled: Sampled) -> None:
        request = generation.request
        before = len(request.output_ids) + 1
        with self._ending(request):
            reason = generation.accept(sampled, self._can_jump)
            self._counters["completion_tokens"] += 1
            self._count_forced(len(request.output_ids) - before)
            self._go_on(generation, reason)

    def _go_on(self, generation: Generation, reason: str | None) -> None:
        if reason:
            self._end(generation.request, reason)
        else:
            self._unwritten.append(generation)

    def _jump(self, generation: Generation) -> bool:
        """Begin with the tokens that a grammar forces; whether there are any, or it ends here."""
        request = generation.request
        if generation.grammar is None or request.output_ids:
            return False
        with self._ending(request):
            reason = generation.jump(self._can_jump)
            self._count_forced(len(request.output_ids))
            self._go_on(generation, reason)
            return bool(request.output_ids or reason)
        return True

    def _count_prompt(self, generation: Generation) -> None:
        """Count a prompt once, when its answer begins."""
        request = generation.request
        if not generation.has_sampled:
            generation.has_sampled = True
            self._counters["prompt_tokens"] += len(request.prompt_ids)
            self._counters["cached_tokens"] += request.num_cached or 0

    def _count_forced(self, count: int) -> None:
        self._counters["completion_tokens"] += count
        self._counters["forced_tokens"] += count

    async def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End the requests of a failed call; a broken CPU loses its pages, not its requests.

        A GPU is lost with all that lies on it: IREE ends the process when it is used again.
        """
        if self._runner.is_broken and not self._device.shares_memory:
            self._device.abandon(self._runner, error)  # whose traceback holds the call's arrays
            raise self._lost("failed", error)
        for request in requests:
            self._end(request, "abort", self._failure_of(error))
        if self._runner.is_broken:
            await self._runner.recover()
            self._scheduler.reset()

    def _take(self, generation: Generation) -> None:
        request = generation.request
        self._generations[request] = generation
        with self._ending(request):
            self._scheduler.add(request)
            if generation.deadline is not None:
                heapq.heappush(self._deadlines, (generation.deadline, request.sequence, request))
                if len(self._deadlines) > 2 * len(self._generations) + 64:  # mostly finished
                    self._deadlines = [d for d in self._deadlines if d[2] in self._generations]
                    heapq.heapify(self._deadlines)
            if request.first_logits is None:  # else its prompt must be computed in any case
                self._jump(generation)

    def _end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """Finish a request, unless it is finished already.

        Raises nothing: whoever waits for the request hears of the first error there is.
        """
        generation = self._generations.pop(request, None)
        if generation is None:
            return
        try:
            self._scheduler.finish(request, reason)
            request.spans = ()  # a deadline may keep the request, but need not keep its tiles
            if error is None:
                generation.finish(reason)
            else:
                generation.write()
        except BaseException as failure:  # what Rust's panics raise is no Exception
            error = error or self._failure_of(failure)
        if error is not None:
            with contextlib.suppress(BaseException):  # nobody is there to be told
                generation.deliver(error)

    @contextlib.contextmanager
    def _ending(self, request: Request) -> Iterator[None]:
        """Work for one request, which ends it, and no other, if it raises."""
        try:
            yield
        except BaseException as error:
            self._end(request, "abort", self._failure_of(error))

    def _do_what_was_asked(self) -> None:
        while self._inbox:
            try:  # `drain` must see it until it is done
                self._inbox[0]()
            finally:
                self._inbox.popleft()

    def _end_late_ones(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            self._end(heapq.heappop(self._deadlines)[2], "timeout")

    def _fail_all(self) -> None:
        while self._inbox:
            with contextlib.suppress(BaseException):
                self._do_what_was_asked()
        for request in list(self._generations):
            self._end(request, "abort", self._closed())

    def _failure_of(self, error: BaseException) -> SfLocalError:
        """What a request is told of an error."""
        if isinstance(error, SfLocalError):
            return error
        if isinstance(error, WrongLogits):
            return self._returned(str(error))
        failure = EngineError(f"the step failed: {reason(error)}")
        failure.__cause__ = error
        return failure

    def _returned(self, what: str) -> SfLocalError:
        text = (
            f"{self._name} returned {what}; only this request ends. The weights may be damaged "
            "(check them with sf-local inspect ARTIFACT --verify), or the model's numbers too "
            f"large for their type ({REPAIR} --weights bf16)"
        )
        return EngineError(text) if self._device.shares_memory else DeviceError(text)

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
        return Limits(*sizes, prefill_tokens=artifact.max_tokens, reuse="nothing")
    if artifact.manifest:
        return Limits(*sizes)
    most = min(Limits.prefill_tokens, artifact.max_tokens)
    whole_pages = max(1, most // config.page_size) * config.page_size
    return Limits(*sizes, prefill_tokens=whole_pages, reuse="pages")


def _running(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Those whose requests have not ended since they were scheduled."""
    return [chunk for chunk in chunks if chunk.request.status is RequestStatus.RUNNING]


def _spans(chunk: Chunk) -> list[Span]:
    """Tiles of which a chunk shows something."""
    return [s for s in chunk.request.spans if s.start < chunk.end and chunk.start < s.end]


def _unseen(chunks: Sequence[Chunk]) -> dict[Tile, NDArray[np.uint8]]:
    """Tiles of which chunks show something, and which have yet to be encoded.

    Another replica may be at one of them as well, and lets go of its pixels at the end.
    """
    tiles = (span.tile for chunk in chunks for span in _spans(chunk))
    return {tile: pixels for tile in tiles if (pixels := tile.pixels) is not None}


def _is_last(chunk: Chunk) -> bool:
    """Whether the next token is sampled after a chunk."""
    return chunk.end == chunk.request.num_tokens


def _wants_logits(chunk: Chunk) -> bool:
    """Whether a generation wants all logits of a chunk, not only those after its last token."""
    return chunk.request.first_logits is not None and chunk.end > chunk.request.first_logits
