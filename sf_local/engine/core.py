"""EngineCore: requests in, tokens out, one step at a time.

It runs on one worker's thread, which alone owns the scheduler, the pages and the samplers. Other
threads may only read `stats` and `num_requests`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from sf_local.artifact.open import Artifact
from sf_local.device.device import Device
from sf_local.engine.executor import Executor, unencoded
from sf_local.engine.failures import Failures
from sf_local.engine.finish_callback import FinishCallback
from sf_local.engine.generation import Generation
from sf_local.engine.grammar_turns import in_turn
from sf_local.engine.output_processor import OutputProcessor
from sf_local.engine.scheduler import Limits, Scheduler
from sf_local.engine.stats import Counters, stats
from sf_local.errors import SfLocalError
from sf_local.grammar.mask import Mask, Masks
from sf_local.kv_cache.page_pool import PagePool
from sf_local.kv_cache.radix_cache import RadixCache
from sf_local.model.outputs import OutputSpec
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Chunk, Row
from sf_local.request.request import Request, RequestStatus
from sf_local.sampling.logits import ModelOutput, find_wrong
from sf_local.sampling.sampler import Sampled, sample

if TYPE_CHECKING:
    from sf_local.grammar.matcher import Grammar

Call = Callable[[Sequence[Chunk], Sequence[Row], OutputSpec], Awaitable[ModelOutput]]


@dataclass(frozen=True)
class Parts:
    """What makes the parts of a core; a traced one has others."""

    make_scheduler: Callable[[PagePool, RadixCache, Limits], Scheduler] = Scheduler
    make_outputs: Callable[..., OutputProcessor] = OutputProcessor
    make_executor: Callable[..., Executor] = Executor
    make_mask: Callable[[Grammar], Mask] = Mask


class EngineCore:
    """Schedules, computes, samples and delivers for one device.

    jump_forward: take tokens that a grammar forces without decoding them, if the model can.
    """

    def __init__(
        self, artifact: Artifact, device: Device, runner: ModelRunner, limits: Limits,
        failures: Failures, *, jump_forward: bool = True, on_finish: FinishCallback | None = None,
        parts: Parts = Parts(),
    ) -> None:  # fmt: skip
        self._device, self._failures, self.runner = device, failures, runner
        self.pool = PagePool(runner.num_pages)
        self.cache = RadixCache(self.pool, artifact.config.page_size)
        self.scheduler = parts.make_scheduler(self.pool, self.cache, limits)
        self._outputs = parts.make_outputs(self.scheduler, failures, on_finish)
        self.request_metrics = self._outputs.request_metrics
        self._executor = parts.make_executor(
            runner, artifact.config.page_size, self._outputs.take_logits
        )
        self._make_mask = parts.make_mask
        self._can_jump = jump_forward and limits.reuse == "tokens"
        self._vocab_size = artifact.manifest.vocab_size if artifact.manifest else None
        self._counters = Counters()

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._outputs.generations)

    def stats(self) -> dict[str, float]:
        """What `Engine.stats` reports, for this device."""
        return stats(self.scheduler, self._counters)

    async def start(self) -> None:
        """Prepare the device; once, before the first step."""
        await self.runner.start()

    async def step(self, started_at: float) -> bool:
        """Advance all running requests by one step; False if there was nothing to compute.

        Text of the tokens that a step samples is delivered while the next call runs.
        """
        self._outputs.expire()
        step = in_turn(self.scheduler.next_step(), self._outputs.generations)
        if not step:
            self._outputs.deliver()
            return False
        if await self._copy_pages(step.copies):
            for chunks in step.prefills:
                await self._advance(await self._encode_images(chunks), self._executor.prefill)
            for chunks in step.decodes:
                await self._advance(chunks, self._executor.decode)
        self._counters.steps += 1
        self._counters.step_seconds += time.perf_counter() - started_at
        self._counters.call_seconds = self.runner.call_seconds
        return True

    def ask_ahead(self) -> bool:
        """Have some of the memory that the next requests will take; False if there is enough."""
        return self.runner.ask_ahead(self.pool.next_pages)

    def add(self, generation: Generation) -> None:
        """Take a new request in."""
        with self._outputs.guard(generation.request):
            self._outputs.add(generation)
            if generation.request.first_logits is None:  # else the prompt must be computed first
                self._jump(generation)

    def cancel(self, generation: Generation) -> None:
        """End a request with what it has, as "abort"."""
        self._outputs.end(generation.request, "abort")

    def flush_cache(self) -> None:
        """Free all pages that no request uses, and their memory on a CPU."""
        self.cache.evict(self.pool.num_cached)
        self.runner.give_back(list(self.pool.next_pages))

    def fail_all(self, make_error: Callable[[], SfLocalError]) -> None:
        """End every request with an error of its own."""
        self._outputs.fail_all(make_error)

    # Run

    async def _advance(self, chunks: Sequence[Chunk], call: Call) -> None:
        """Compute chunks in one call, and sample the next token of the requests that are complete.

        If the call fails, its requests end, and no others. If what it returned for one request is
        wrong, that request ends alone.
        """
        chunks = _running(chunks)
        if not chunks:
            return
        chunks.sort(key=attrgetter("needs_logits"), reverse=True)
        generations = [self._outputs.generations[chunk.request] for chunk in chunks]
        masks = _masks(chunks, generations, self._make_mask)
        rows = self._executor.rows(chunks)
        try:
            spec = _output_spec(chunks, generations, masks, self._outputs.deliver)
            output = await call(chunks, rows, spec)
        except Exception as error:
            await self._fail_call([chunk.request for chunk in chunks], error)
            self.cache.forget(self._executor.written_pages(rows))
            return
        if wrong := find_wrong(output, self._vocab_size):
            await self._end_wrong([(chunks[i], what) for i, what in wrong.items()])
            self.cache.forget(self._executor.written_pages([rows[i] for i in wrong]))
        self.scheduler.commit(chunks)
        self._sample(chunks, generations, output, masks)

    async def _end_wrong(self, wrong: Sequence[tuple[Chunk, str]]) -> None:
        """End requests for which a call returned what cannot be right.

        Page 0 is zeroed here, as nobody begins it: rows write to it that only pad a batch.
        """
        for chunk, what in wrong:
            error = self._failures.returned(f"{what} after position {chunk.end - 1}")
            self._outputs.end(chunk.request, "abort", error)
        try:
            await self.runner.clear_pages([0])
        except Exception as error:
            await self._fail_call([], error)

    async def _copy_pages(self, copies: Sequence[tuple[int, int]]) -> bool:
        """Whether that worked, or there was nothing to copy."""
        if not copies:
            return True
        try:
            await self._executor.copy_pages(copies)
        except Exception as error:
            targets = {target for _, target in copies}
            requests = [r for r in self._outputs.generations if targets & {*r.pages}]
            await self._fail_call(requests, error)
            return False
        return True

    async def _encode_images(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Encode at most one batch of missing tiles; return the chunks that are ready.

        The rest wait for the next step, so that others decode in between.
        """
        chunks = _running(chunks)
        tiles = self._executor.next_tiles(chunks)
        if not tiles:
            return chunks
        self._outputs.deliver()  # the text of others need not wait for the call
        started_at = time.perf_counter()
        try:
            encoded = await self._executor.encode(tiles)
        except Exception as error:
            shown = [c.request for c in chunks if tiles.keys() & unencoded([c]).keys()]
            await self._fail_call(shown, error)
            return [chunk for chunk in chunks if not unencoded([chunk])]
        self._counters.encode_seconds += time.perf_counter() - started_at
        self._counters.encoded_tiles += len(encoded)
        for tile, embeds in encoded.items():
            if np.isfinite(embeds).all():
                tile.embeds, tile.pixels = embeds, None
            else:
                what = "NaN or infinity among the embeddings of an image"
                self._outputs.fail_tile(tile, self._failures.returned(what))
        return [chunk for chunk in chunks if not unencoded([chunk])]

    async def _fail_call(self, requests: Iterable[Request], error: Exception) -> None:
        """End the requests of a failed call; on a CPU, others compute their lost pages again.

        A GPU is lost with all that lies on it: IREE ends the process when it is used again.
        """
        if self.runner.is_broken and not self._device.shares_memory:
            self._device.leak(self.runner, error)  # whose traceback holds the call's arrays
            raise self._failures.lost("failed", error)
        for request in requests:
            self._outputs.fail(request, error)
        if self.runner.is_broken:
            await self.runner.recover()
            self.scheduler.reset()

    # Sample

    def _sample(
        self, chunks: Sequence[Chunk], generations: Sequence[Generation], output: ModelOutput,
        masks: Masks,
    ) -> None:  # fmt: skip
        """The next token of each request whose last token was computed."""
        rows = []
        for i, (chunk, generation) in enumerate(zip(chunks, generations, strict=True)):
            if chunk.is_last and chunk.request.status is RequestStatus.RUNNING:
                if i in masks.errors:
                    self._outputs.fail(chunk.request, masks.errors[i])
                elif generation.has_sampled or self._begins_to_sample(generation):
                    rows.append(i)
        if not rows:
            return
        started_at = time.perf_counter()
        if len(rows) < len(chunks):
            output = output.take(rows)
            generations = [generations[i] for i in rows]
        sampled = sample([g.sampler for g in generations], output, [masks.rows[i] for i in rows])
        self._counters.mask_seconds += masks.seconds
        self._counters.sample_seconds += time.perf_counter() - started_at
        self._accept(generations, sampled)

    def _begins_to_sample(self, generation: Generation) -> bool:
        """Whether the first token of the answer is sampled now, after the whole prompt."""
        request = generation.request
        generation.has_sampled = True
        self._counters.prompt_tokens += len(request.prompt_ids)
        self._counters.cached_tokens += request.num_cached or 0
        if request.max_new_tokens == 0:
            self._outputs.end(request, "length")
            return False
        return bool(request.output_ids) or not self._jump(generation)

    def _accept(
        self, generations: Sequence[Generation], sampled: Sequence[Sampled | BaseException]
    ) -> None:
        for generation, choice in zip(generations, sampled, strict=True):
            request = generation.request
            if not isinstance(choice, Sampled):
                self._outputs.fail(request, choice)
                continue
            before = request.num_tokens
            try:
                reason = generation.accept(choice, self._can_jump)
            except BaseException as error:  # Rust's panics are no Exception
                self._outputs.fail(request, error)
                continue
            count = request.num_tokens - before
            self._counters.completion_tokens += count
            self._counters.forced_tokens += count - 1
            self._outputs.has_news(generation, reason)

    def _jump(self, generation: Generation) -> bool:
        """Begin an answer with what a grammar forces; whether it forces anything, or ends here."""
        request = generation.request
        if generation.grammar is None:
            return False
        with self._outputs.guard(request):
            reason = generation.jump(self._can_jump)
            count = len(request.output_ids)
            self._counters.completion_tokens += count
            self._counters.forced_tokens += count
            self._outputs.has_news(generation, reason)
            return bool(count or reason)
        return True


def _running(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks whose requests have not ended since they were scheduled."""
    return [chunk for chunk in chunks if chunk.request.status is RequestStatus.RUNNING]


def _output_spec(
    chunks: Sequence[Chunk], generations: Sequence[Generation], masks: Masks,
    deliver: Callable[[], None],
) -> OutputSpec:  # fmt: skip
    """What a call returns, and what the host does while the device computes."""

    def meanwhile() -> None:
        deliver()
        masks.fill()

    return OutputSpec(
        [generation.sampler.inv_temperature for generation in generations],
        num_logits=sum([chunk.needs_logits for chunk in chunks]),
        copy=False,
        meanwhile=meanwhile,
    )


def _masks(
    chunks: Sequence[Chunk], generations: Sequence[Generation],
    make_mask: Callable[[Grammar], Mask],
) -> Masks:  # fmt: skip
    """The masks of the grammars whose next token is sampled after these chunks."""
    needed = [
        chunk.is_last and generation.grammar is not None and generation.sampler.needs_mask
        for chunk, generation in zip(chunks, generations, strict=True)
    ]
    return Masks([generation.grammar for generation in generations], needed, make_mask)
