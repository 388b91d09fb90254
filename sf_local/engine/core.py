"""EngineCore: requests in, tokens out, one step at a time.

Runs on one worker's thread, which alone owns scheduler, pages and samplers: nothing here is called
from anywhere else but `stats` and `num_requests`, which only read.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sf_local.artifact.open import Artifact
from sf_local.device.device import Device
from sf_local.engine.executor import Executor, unencoded
from sf_local.engine.failures import Failures
from sf_local.engine.generation import Generation
from sf_local.engine.scheduler import Limits, Scheduler
from sf_local.engine.stats import Counters, stats
from sf_local.errors import SfLocalError
from sf_local.grammar.mask import Masks
from sf_local.kv_cache.page_pool import PagePool
from sf_local.kv_cache.radix_cache import RadixCache
from sf_local.model.outputs import OutputSpec
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Chunk, Row
from sf_local.request.prompt import Tile
from sf_local.request.request import Request
from sf_local.sampling.logits import ModelOutput, find_wrong
from sf_local.sampling.sampler import Sampled, sample

Call = Callable[[Sequence[Chunk], list[Row], OutputSpec], Awaitable[ModelOutput]]


class EngineCore:
    """Schedules, computes, samples and delivers for one device."""

    def __init__(
        self, artifact: Artifact, device: Device, runner: ModelRunner, num_pages: int,
        limits: Limits, failures: Failures,
    ) -> None:  # fmt: skip
        self._device, self._failures = device, failures
        self.pool = PagePool(num_pages)
        self.cache = RadixCache(self.pool, artifact.config.page_size)
        self.scheduler = Scheduler(self.pool, self.cache, limits)
        self._can_jump = limits.reuse == "tokens"  # compute several tokens from anywhere
        self._vocab_size = artifact.manifest.vocab_size if artifact.manifest else None
        self.runner = runner
        self._executor = Executor(runner, artifact.config.page_size)
        self._generations: dict[Request, Generation] = {}
        self._unwritten: list[Generation] = []  # their new text is delivered beside the next call
        self._deadlines: list[tuple[float, int, Request]] = []  # heap
        self._counters = Counters()

    @property
    def num_requests(self) -> int:
        return len(self._generations)

    def stats(self) -> dict[str, float]:
        return stats(self.scheduler, self._counters)

    async def start(self) -> None:
        await self.runner.start()

    async def step(self, started_at: float) -> bool:
        """Advance all requests that run by one step; False if there is nothing to compute."""
        self._expire()
        step = self.scheduler.next_step()
        if not step:
            self._deliver()
            return False
        if await self._copy_pages(step.copies):
            for chunks in step.prefills:
                await self._advance(await self._encoded(chunks), self._prefill)
            for chunks in step.decodes:
                await self._advance(chunks, self._decode)
        self._counters.steps += 1
        self._counters.step_seconds += time.perf_counter() - started_at
        self._counters.call_seconds = self.runner.call_seconds
        return True

    def add(self, generation: Generation) -> None:
        """Take a new request in."""
        request = generation.request
        self._generations[request] = generation
        with self._ending(request):
            self.scheduler.add(request)
            if generation.deadline is not None:
                self._remember_deadline(generation.deadline, request)
            if request.first_logits is None:  # else its prompt must be computed in any case
                self._jump(generation)

    def cancel(self, generation: Generation) -> None:
        self._end(generation.request, "abort")

    def flush_cache(self) -> None:
        """Free all pages that no request uses."""
        self.cache.evict(self.pool.num_cached)

    def fail_all(self, make_error: Callable[[], SfLocalError]) -> None:
        """End every request with an error of its own."""
        for request in list(self._generations):
            self._end(request, "abort", make_error())

    # Run

    async def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> bool:
        """Whether that worked, or there was nothing to copy."""
        if not copies:
            return True
        try:
            await self.runner.copy_pages(copies)
        except Exception as error:
            targets = {target for _, target in copies}
            await self._fail([r for r in self._generations if targets & {*r.pages}], error)
            return False
        return True

    async def _encoded(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Encode at most one batch of missing tiles; the chunks that are ready. The rest wait for
        the next step, and others decode between."""
        chunks = [chunk for chunk in chunks if chunk.is_running]
        tiles = unencoded(chunks)
        if not tiles:
            return chunks
        self._deliver()  # others' text need not wait for it
        try:
            await self._encode(tiles)
        except Exception as error:
            await self._fail([c.request for c in chunks if unencoded([c])], error)
        return [chunk for chunk in chunks if not unencoded([chunk])]

    async def _encode(self, tiles: dict[Tile, NDArray[np.uint8]]) -> None:
        """Keep the embeddings of tiles; those that are wrong end the requests that show them."""
        started_at = time.perf_counter()
        encoded = await self._executor.encode(tiles)
        self._counters.encode_seconds += time.perf_counter() - started_at
        for tile, embeds in encoded.items():
            if np.isfinite(embeds).all():
                tile.embeds, tile.pixels = embeds, None
                continue
            error = self._failures.returned("NaN or infinity among the embeddings of an image")
            for request in list(self._generations):
                if any(span.tile is tile for span in request.spans):
                    self._end(request, "abort", error)
        self._counters.encoded_tiles += len(encoded)

    async def _prefill(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        return await self._executor.prefill(chunks, rows, spec, self._take_logits)

    async def _decode(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        return await self.runner.decode(rows, spec)

    def _take_logits(self, chunk: Chunk, logits: NDArray[np.float32]) -> None:
        request = chunk.request
        generation = self._generations.get(request)
        if generation is None:
            return
        with self._ending(request):
            generation.take_logits(chunk.start, logits)
        if chunk.end >= len(request.prompt_ids):
            request.first_logits = None

    async def _advance(self, chunks: Sequence[Chunk], call: Call) -> None:
        """Compute chunks in one call, and go on with the requests whose next token follows.

        If the call fails, its requests do, and no others. A request ends alone if what the call
        returned for it is wrong.
        """
        chunks = [chunk for chunk in chunks if chunk.is_running]
        if not chunks:
            return
        chunks.sort(key=lambda chunk: chunk.needs_logits, reverse=True)
        generations = [self._generations[chunk.request] for chunk in chunks]
        masks = _masks(chunks, generations)
        try:
            rows = self._executor.rows(chunks)
            output = await call(chunks, rows, self._wanted(chunks, generations, masks))
        except Exception as error:
            await self._fail([chunk.request for chunk in chunks], error)
            return
        wrong = find_wrong(output, self._vocab_size)
        for i, what in wrong.items():
            failure = self._failures.returned(f"{what} after position {chunks[i].end - 1}")
            self._end(chunks[i].request, "abort", failure)
        for chunk in chunks:
            self.scheduler.computed(chunk)
        self._sample(chunks, output, masks)
        if wrong:
            await self._clear([rows[i] for i in wrong])

    def _wanted(
        self, chunks: Sequence[Chunk], generations: Sequence[Generation], masks: Masks
    ) -> OutputSpec:
        def meanwhile() -> None:
            """What the host does while the device computes: the last step's text, masks."""
            self._deliver()
            masks.fill()

        return OutputSpec(
            [generation.sampler.inv_temperature for generation in generations],
            num_logits=sum(chunk.needs_logits for chunk in chunks),
            copy=False,
            meanwhile=meanwhile,
        )

    async def _clear(self, rows: Sequence[Row]) -> None:
        """Clear what a call wrote for requests that have ended because it was wrong.

        Keys and values may be NaN where logits are, and those pages will be others': attention
        multiplies what it masks by zero, and NaN survives that. So may page 0, of padding.
        """
        pages = [
            0,
            *(page for row in rows for page in row.page_ids[row.start // self.cache.page_size :]),
        ]
        self.cache.forget(pages)
        try:
            await self.runner.clear_pages(pages)
        except Exception as error:
            await self._fail([], error)

    # Sample

    def _sample(self, chunks: Sequence[Chunk], output: ModelOutput, masks: Masks) -> None:
        """The next token of each request whose last token was computed."""
        rows, generations = [], []
        for i, chunk in enumerate(chunks):
            generation = self._generations.get(chunk.request) if chunk.is_last else None
            if generation is not None and self._is_to_sample(generation, masks.errors.get(i)):
                rows.append(i)
                generations.append(generation)
        if not rows:
            return
        started_at = time.perf_counter()
        if len(rows) < len(chunks):
            output = output.take(rows)
        samplers = [generation.sampler for generation in generations]
        sampled = sample(samplers, output, [masks.rows[i] for i in rows])
        self._counters.mask_seconds += masks.seconds
        self._counters.sample_seconds += time.perf_counter() - started_at
        for generation, choice in zip(generations, sampled, strict=True):
            if isinstance(choice, Sampled):
                self._accept(generation, choice)
            else:
                self._end(generation.request, "abort", self._failures.of_request(choice))

    def _is_to_sample(self, generation: Generation, mask_error: Exception | None) -> bool:
        """Count a prompt that was computed; whether a token is drawn after it."""
        request = generation.request
        self._count_prompt(generation)
        if request.max_new_tokens == 0:
            self._end(request, "length")
        elif mask_error is not None:
            self._end(request, "abort", self._failures.of_request(mask_error))
        else:
            return not self._jump(generation)
        return False

    def _accept(self, generation: Generation, sampled: Sampled) -> None:
        request = generation.request
        before = len(request.output_ids) + 1
        with self._ending(request):
            reason = generation.accept(sampled, self._can_jump)
            self._counters.completion_tokens += 1
            self._count_forced(len(request.output_ids) - before)
            self._go_on(generation, reason)

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

    def _go_on(self, generation: Generation, reason: str | None) -> None:
        if reason:
            self._end(generation.request, reason)
        else:
            self._unwritten.append(generation)

    def _count_prompt(self, generation: Generation) -> None:
        """Count a prompt once, when its answer begins."""
        request = generation.request
        if not generation.has_sampled:
            generation.has_sampled = True
            self._counters.prompt_tokens += len(request.prompt_ids)
            self._counters.cached_tokens += request.num_cached or 0

    def _count_forced(self, count: int) -> None:
        self._counters.completion_tokens += count
        self._counters.forced_tokens += count

    # Deliver, and end

    def _deliver(self) -> None:
        """Deliver the text of the tokens that were accepted since the last time."""
        for generation in self._unwritten:
            with self._ending(generation.request):
                generation.write()
        self._unwritten.clear()

    def _end(self, request: Request, reason: str, error: BaseException | None = None) -> None:
        """Finish a request, unless it is finished already.

        Raises nothing: whoever waits for the request hears of the first error there is.
        """
        generation = self._generations.pop(request, None)
        if generation is None:
            return
        try:
            self.scheduler.finish(request, reason)
            request.spans = ()  # a deadline may keep the request, but need not keep its tiles
            if error is None:
                generation.finish(reason)
            else:
                generation.write()
        except BaseException as failure:  # what Rust's panics raise is no Exception
            error = error or self._failures.of_request(failure)
        if error is not None:
            with contextlib.suppress(BaseException):  # nobody is there to be told
                generation.deliver(error)

    @contextlib.contextmanager
    def _ending(self, request: Request) -> Iterator[None]:
        """Work for one request, which ends it, and no other, if it raises."""
        try:
            yield
        except BaseException as error:
            self._end(request, "abort", self._failures.of_request(error))

    async def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End the requests of a failed call; a broken CPU loses its pages, not its requests.

        A GPU is lost with all that lies on it: IREE ends the process when it is used again.
        """
        if self.runner.is_broken and not self._device.shares_memory:
            self._device.leak(self.runner, error)  # whose traceback holds the call's arrays
            raise self._failures.lost("failed", error)
        for request in requests:
            self._end(request, "abort", self._failures.of_request(error))
        if self.runner.is_broken:
            await self.runner.recover()
            self.scheduler.reset()

    def _remember_deadline(self, deadline: float, request: Request) -> None:
        heapq.heappush(self._deadlines, (deadline, request.sequence, request))
        if len(self._deadlines) > 2 * len(self._generations) + 64:  # mostly finished
            self._deadlines = [d for d in self._deadlines if d[2] in self._generations]
            heapq.heapify(self._deadlines)

    def _expire(self) -> None:
        """End the requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
            self._end(heapq.heappop(self._deadlines)[2], "timeout")


def _masks(chunks: Sequence[Chunk], generations: Sequence[Generation]) -> Masks:
    """What grammars allow after each chunk."""
    needed = [c.is_last and g.sampler.needs_mask for c, g in zip(chunks, generations, strict=True)]
    return Masks([generation.grammar for generation in generations], needed)
