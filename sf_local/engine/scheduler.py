"""Scheduler: which requests compute which tokens next, and whose pages make room for whom.

Pure Python; it knows nothing of devices. A request with one token left to compute decodes, one for
which a grammar forced several tokens prefills these, the others prefill their prompts in chunks.
Every step has room for all three kinds, so that a long prompt delays the others by one chunk a
step, and not by all of itself; and every third step has a short call for prompts behind a long one.
"""

from __future__ import annotations

import itertools
import logging
import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sf_local.engine.log import log
from sf_local.kv_cache.page_pool import PagePool
from sf_local.kv_cache.radix_cache import Match, RadixCache, common_prefix_len
from sf_local.request.batch import Chunk, Step
from sf_local.request.request import Request, RequestStatus

PREFILL_TOKENS, ALONE_TOKENS, MAX_RUNNING = 256, 512, 64  # defaults of Engine
# Every third step has a side call of a fifth of prefill_tokens, a 15th of what the steps prefill
SIDE_CALL_EVERY, SIDE_CALL_SHARE = 3, 5
MAX_EXAMINED = 64  # waiting requests looked at in one step


@dataclass(frozen=True)
class Limits:
    """What one step may hold.

    Attributes:
        prefill_batch_sizes, decode_batch_sizes: rows of a compiled call, ascending.
        prefill_tokens: tokens that are prefilled in one step, padding included.
        alone_tokens: the same of the only request that there is, if that is more.
        max_running: requests that own KV pages at a time.
        logits_tokens: tokens of a call that returns the logits after each of them, padding
            included.
        reuse: whether a prefill can start at any token, at whole pages only, or nowhere but at the
            beginning of the prompt.
    """

    prefill_batch_sizes: Sequence[int]
    decode_batch_sizes: Sequence[int]
    prefill_tokens: int = PREFILL_TOKENS
    max_running: int = MAX_RUNNING
    reuse: Literal["tokens", "pages", "nothing"] = "tokens"
    logits_tokens: int = 1 << 30
    alone_tokens: int = 0

    @property
    def most_prefill_tokens(self) -> int:
        """The most tokens that are ever prefilled in one step."""
        return max(self.prefill_tokens, self.alone_tokens)


class Scheduler:
    """First come, first served within a priority; running requests own their pages.

    After `next_step`, do its copies, then report every call's chunks with `commit`; take requests
    out with `finish` at any time but between a step and its copies. A request whose prefix another
    one is about to compute waits for that one (its `prefix_leader`).
    """

    def __init__(self, pool: PagePool, cache: RadixCache, limits: Limits) -> None:
        self.pool, self.cache, self.limits = pool, cache, limits
        self.waiting: list[Request] = []  # in order of `rank`
        self.running: list[Request] = []  # the same
        self.num_preemptions = self.num_evictions = 0  # of requests; of cached pages
        self._arrivals = itertools.count()
        self._num_passed = 0  # steps in a row that left prompts out

    def add(self, request: Request) -> None:
        """Let a request wait: a new one behind all others of its priority, another where it was."""
        if request.sequence < 0:
            request.sequence = next(self._arrivals)
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_rank)

    def next_step(self) -> Step:
        """The next piece of work, with pages for all its tokens; empty when there is none."""
        before = self.num_preemptions, self.num_evictions
        self._reserve_for_decodes()
        copies = self._admit()
        if (self.num_preemptions, self.num_evictions) != before:
            _log_room(self, *before)
        decoding, jumping, prompts = self._by_phase()
        size = self.limits.decode_batch_sizes[-1]
        decodes = [decoding[i : i + size] for i in range(0, len(decoding), size)]
        return Step(copies, self._prefills(jumping, prompts), decodes)

    def commit(self, chunks: Sequence[Chunk]) -> None:
        """The keys and values of these chunks are in their pages; what was prefilled becomes
        visible to other requests."""
        for chunk in chunks:
            request = chunk.request
            if request.status is RequestStatus.RUNNING:
                request.num_computed = chunk.end
                if not chunk.is_decode:
                    self._publish(request)

    def finish(self, request: Request, reason: str) -> None:
        """Take a request out, wherever it is; what it computed stays in the cache."""
        if request.status is RequestStatus.FINISHED:
            return
        if request.status is RequestStatus.RUNNING:
            self._stop(request)
        else:
            _take_out(self.waiting, request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason

    def reset(self) -> None:
        """All pages lost their contents: forget the cache, and compute running requests again."""
        self.cache.clear()
        for request in list(self.running):
            request.num_computed = 0
            self._stop(request)
            self.add(request)

    def _stop(self, request: Request) -> None:
        """Take a running request off its pages."""
        _take_out(self.running, request)
        self._publish(request)
        self.pool.release(request.pages)
        request.pages, request.num_computed, request.num_published = [], 0, 0

    def _publish(self, request: Request) -> None:
        tokens = request.keys(request.num_computed)
        request.pages = self.cache.insert(tokens, request.pages)
        request.num_published = request.num_computed

    # Pages

    def _reserve_for_decodes(self) -> None:
        """Pages for the new tokens of running requests, at the cost of later ones."""
        page_size = self.cache.page_size
        for request in list(self.running):
            is_full = request.num_tokens > len(request.pages) * page_size
            if is_full and request.status is RequestStatus.RUNNING:
                self._grow(request)

    def _grow(self, request: Request) -> None:
        """Pages for all tokens: free ones, else cached ones, else those of the last in rank."""
        missing = self._num_pages(request.num_tokens) - len(request.pages)
        while missing > self.pool.num_free + self.pool.num_cached:
            assert len(self.running) > 1, "a request outgrew the pool; `Engine` limits its length"
            victim = self.running[-1]
            self._stop(victim)
            self.add(victim)
            self.num_preemptions += 1
            if victim is request:
                return
        request.pages += self._allocate(missing)

    def _allocate(self, count: int) -> list[int]:
        if count > self.pool.num_free:
            self.num_evictions += self.cache.evict(count - self.pool.num_free)
        return self.pool.allocate(max(count, 0))

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.page_size)

    # Admission

    def _admit(self) -> list[tuple[int, int]]:
        """Start waiting requests while there is room; returns the page copies they need."""
        copies: list[tuple[int, int]] = []
        for request in self.waiting[:MAX_EXAMINED]:
            if len(self.running) >= self.limits.max_running:
                break
            if self._waits_for_leader(request):
                continue
            match = self._match(request)
            if self._find_leader(request, match):
                continue
            if not self._start(request, match, copies):
                break
        return copies

    def _match(self, request: Request) -> Match:
        """What the cache has of all tokens but those whose logits are wanted."""
        if self.limits.reuse == "nothing":
            return Match([])
        match = self.cache.match(request.keys(request.num_reusable))
        return match if self.limits.reuse == "tokens" else Match(match.pages)

    def _waits_for_leader(self, request: Request) -> bool:
        """Whether the request that computes the same prefix is still at it."""
        leader = request.prefix_leader
        if leader is None or leader.status is not RequestStatus.RUNNING:
            request.prefix_leader = None
            return False
        return not leader.is_decoding and leader.num_published < request.prefix_len

    def _find_leader(self, request: Request, match: Match) -> bool:
        """Look for a running request that is about to compute a longer prefix than is cached."""
        if self.limits.reuse == "nothing":
            return False
        have = len(match.pages) * self.cache.page_size + match.num_partial
        more = have + self.cache.page_size
        tokens = request.keys(request.num_reusable)
        if len(tokens) < more:
            return False
        for other in self.running:
            if other.is_decoding or _rank(other) > _rank(request):  # those are served later
                continue
            # One page first: comparing whole prompts of all pairs would take seconds
            if other.keys(more, have) != tokens[have:more]:
                continue
            shared = common_prefix_len(tokens, other.keys(other.num_tokens))
            if shared >= more and shared > other.num_published:
                request.prefix_leader = other
                request.prefix_len = shared
                return True
        return False

    def _start(self, request: Request, match: Match, copies: list[tuple[int, int]]) -> bool:
        """Give a request pages for all its tokens, those of the match shared; False if too few."""
        self.pool.retain(match.pages)
        missing = self._num_pages(request.num_tokens) - len(match.pages)
        spare = len(self.running)  # a page for each, or the newcomer is preempted at once
        if missing + spare > self.pool.num_free + self.pool.num_cached:
            self.pool.release(match.pages)
            return False
        request.pages = match.pages + self._allocate(missing)
        request.num_computed = len(match.pages) * self.cache.page_size
        if match.num_partial:
            copy = match.partial_page, request.pages[len(match.pages)]
            if copy[0] != copy[1]:  # else it was evicted for this very place
                copies.append(copy)
            request.num_computed += match.num_partial
        if request.num_cached is None:
            request.num_cached = min(request.num_computed, len(request.prompt_ids))
            request.scheduled_at = time.perf_counter()
        _take_out(self.waiting, request)
        request.status, request.prefix_leader = RequestStatus.RUNNING, None
        request.num_published = request.num_computed
        insort(self.running, request, key=_rank)
        return True

    # Calls

    def _by_phase(self) -> tuple[list[Chunk], list[Request], list[Request]]:
        """Chunks of all requests that decode; requests with forced tokens; those with a prompt."""
        decoding: list[Chunk] = []
        jumping: list[Request] = []
        prompts: list[Request] = []
        for request in self.running:
            start, end = request.num_computed, request.num_tokens
            if request.is_decoding:
                needs_logits = not request.takes_the_best
                decoding.append(Chunk(request, start, end, True, needs_logits, is_decode=True))
            else:
                (jumping if start >= len(request.prompt_ids) else prompts).append(request)
        return decoding, jumping, prompts

    def _prefills(
        self, jumping: Sequence[Request], prompts: Sequence[Request]
    ) -> list[list[Chunk]]:
        """Calls for forced tokens until the budget is spent, then one call for prompts."""
        is_alone = len(self.running) + len(self.waiting) == 1
        budget = self.limits.most_prefill_tokens if is_alone else self.limits.prefill_tokens
        calls, num_slots = [], 0
        while jumping and num_slots < budget:
            chunks, slots = self._prefill_call(jumping, budget)
            calls.append(chunks)
            jumping, num_slots = jumping[len(chunks) :], num_slots + slots
        if prompts:
            chunks, _ = self._prefill_call(prompts, budget)
            calls += [chunks, *self._side_calls(prompts, {chunk.request for chunk in chunks})]
        return calls

    def _side_calls(self, prompts: Sequence[Request], served: set[Request]) -> list[list[Chunk]]:
        """In every third step that leaves prompts out, a short call for those of the first one's
        priority, the ones with the least to compute first."""
        priority = prompts[0].params.priority
        passed = [r for r in prompts if r not in served and r.params.priority == priority]
        self._num_passed = self._num_passed + 1 if passed and self.limits.reuse != "nothing" else 0
        if self._num_passed < SIDE_CALL_EVERY:
            return []
        self._num_passed = 0
        passed.sort(key=lambda request: request.num_tokens - request.num_computed)
        page, most = self.cache.page_size, self.limits.prefill_tokens
        budget = min(most, max(1, most // SIDE_CALL_SHARE // page) * page)
        return [self._prefill_call(passed, budget)[0]]

    def _prefill_call(self, requests: Sequence[Request], budget: int) -> tuple[list[Chunk], int]:
        """Chunks of the first requests, while the padded call keeps to the budget, and its size."""
        page, sizes = self.cache.page_size, self.limits.prefill_batch_sizes
        chunks: list[Chunk] = []
        longest = num_slots = 0
        for request in requests[: sizes[-1]]:
            count = _next_len(request, self.limits, budget)
            chunk = _prefill_chunk(request, request.num_computed + count)
            if chunk.wants_all_logits:
                budget = min(budget, self.limits.logits_tokens)
            padded = -(-max(count, longest) // page) * page
            slots = next(size for size in sizes if size > len(chunks)) * padded
            if chunks and slots > budget:
                break
            chunks.append(chunk)
            longest, num_slots = max(longest, count), slots
        return chunks, num_slots


def _log_room(scheduler: Scheduler, num_preemptions: int, num_evictions: int) -> None:
    """Log what a step gave up to have KV pages; the numbers are those before it."""
    log(
        logging.DEBUG, "made room: %d requests preempted, %d cached KV pages evicted",
        scheduler.num_preemptions - num_preemptions, scheduler.num_evictions - num_evictions,
    )  # fmt: skip


def _rank(request: Request) -> tuple[int, int]:
    return (-request.params.priority, request.sequence)


def _take_out(requests: list[Request], request: Request) -> None:
    """Remove a request from a list in order of `rank`, without looking at all of them."""
    del requests[bisect_left(requests, _rank(request), key=_rank)]


def _prefill_chunk(request: Request, end: int) -> Chunk:
    """What follows the computed tokens of a request, up to `end`."""
    start, first = request.num_computed, request.first_logits
    is_last = end == request.num_tokens
    return Chunk(
        request, start, end, is_last,
        needs_logits=is_last and not request.takes_the_best,
        wants_all_logits=first is not None and end > first,
        spans=[span for span in request.spans if span.start < end and start < span.end],
    )  # fmt: skip


def _next_len(request: Request, limits: Limits, most: int) -> int:
    """Tokens of the next chunk, at most `most`; where one can start anywhere, those whose logits
    are wanted begin one of their own."""
    start, first = request.num_computed, request.first_logits
    if first is not None and start + most > first:
        if limits.reuse == "tokens" and start < first:
            return first - start
        most = min(most, limits.logits_tokens)
    return min(request.num_tokens - start, most)
