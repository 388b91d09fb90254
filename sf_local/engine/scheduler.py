"""Scheduler: which requests compute which tokens next, and whose pages make room for whom.

Pure Python; knows nothing of devices. Requests that have one token left to compute decode, those
whose grammar jumped ahead prefill these few tokens, the others prefill their prompts in chunks; all
happens in every step, so none waits for the others.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sf_local.artifact.open import Artifact
from sf_local.kv_cache.page_pool import PagePool
from sf_local.kv_cache.radix_cache import Match, RadixCache, common_prefix_len
from sf_local.request.batch import Chunk, Step
from sf_local.request.request import Request, RequestStatus

MAX_EXAMINED = 64  # waiting requests looked at in one step


@dataclass(frozen=True)
class Limits:
    """What one step may hold: compiled batch sizes, tokens of prefill, requests with pages.

    reuse: whether a prefill can start at any token, at pages only, or nowhere but at the beginning.
    """

    prefill_batch_sizes: Sequence[int]
    decode_batch_sizes: Sequence[int]
    prefill_tokens: int = 256
    max_running: int = 64
    reuse: Literal["tokens", "pages", "nothing"] = "tokens"


class Scheduler:
    """First come, first served within a priority; running requests own their pages.

    After `next_step`, do its copies, then report every chunk with `computed`; take requests out
    with `finish` at any time but between a step and its copies. Requests that share an uncomputed
    prefix wait for the first of them.
    """

    def __init__(self, pool: PagePool, cache: RadixCache, limits: Limits) -> None:
        self.pool, self.cache, self.limits = pool, cache, limits
        self.waiting: list[Request] = []  # in order of `rank`
        self.running: list[Request] = []  # the same
        self.num_preemptions = 0
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Let a request wait: a new one behind all others of its priority, another where it was."""
        if request.sequence < 0:
            request.sequence = next(self._arrivals)
        request.status = RequestStatus.WAITING
        insort(self.waiting, request, key=_rank)

    def next_step(self) -> Step:
        """The next piece of work, with pages for all its tokens; empty when there is none."""
        self._reserve_for_decodes()
        copies = self._admit()
        decoding = [r for r in self.running if r.is_decoding]
        size = self.limits.decode_batch_sizes[-1]
        groups = [decoding[i : i + size] for i in range(0, len(decoding), size)]
        decodes = [[Chunk.of(r, r.num_tokens) for r in group] for group in groups]
        return Step(copies, self._prefills(), decodes)

    def computed(self, chunk: Chunk) -> None:
        """A chunk's keys and values are in its pages; a prompt's become visible to others."""
        request = chunk.request
        if request.status is not RequestStatus.RUNNING:
            return
        was_decoding = request.is_decoding
        request.num_computed = chunk.end
        if not was_decoding:
            self._publish(request)

    def finish(self, request: Request, reason: str) -> None:
        """Take a request out, wherever it is; what it computed stays in the cache."""
        if request.status is RequestStatus.FINISHED:
            return
        if request.status is RequestStatus.RUNNING:
            self._stop(request)
        else:
            self.waiting.remove(request)
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
        self.running.remove(request)
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
        for request in list(self.running):
            if request.status is RequestStatus.RUNNING:
                self._grow(request)

    def _grow(self, request: Request) -> None:
        """Pages for all tokens: free ones, else cached ones, else those of the last in rank."""
        missing = self._num_pages(request.num_tokens) - len(request.pages)
        if missing <= 0:
            return
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
            self.cache.evict(count - self.pool.num_free)
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
        have = len(match.pages) * self.cache.page_size + match.num_partial
        tokens = request.keys(request.num_reusable)
        if self.limits.reuse == "nothing":
            return False
        for other in self.running:
            if other.is_decoding or _rank(other) > _rank(request):  # those are served later
                continue
            shared = common_prefix_len(tokens, other.keys(other.num_tokens))
            if shared >= have + self.cache.page_size and shared > other.num_published:
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
        self.waiting.remove(request)
        request.status, request.prefix_leader = RequestStatus.RUNNING, None
        request.num_published = request.num_computed
        insort(self.running, request, key=_rank)
        return True

    def _prefills(self) -> list[list[Chunk]]:
        """Calls for those whose grammar jumped ahead, then one for prompts; each to the budget."""
        jumping = [r for r in self.running if r.is_jumping]
        prompts = [r for r in self.running if not (r.is_jumping or r.is_decoding)]
        calls, num_slots = [], 0
        while jumping and num_slots < self.limits.prefill_tokens:
            chunks, slots = self._prefill_call(jumping)
            calls.append(chunks)
            jumping, num_slots = jumping[len(chunks) :], num_slots + slots
        if prompts:
            calls.append(self._prefill_call(prompts)[0])
        return calls

    def _prefill_call(self, requests: Sequence[Request]) -> tuple[list[Chunk], int]:
        """Chunks of the first requests, while the padded call keeps to the budget, and its size."""
        page, sizes = self.cache.page_size, self.limits.prefill_batch_sizes
        chunks: list[Chunk] = []
        longest = num_slots = 0
        for request in requests[: sizes[-1]]:
            count = self._next_len(request)
            padded = -(-max(count, longest) // page) * page
            slots = next(size for size in sizes if size > len(chunks)) * padded
            if chunks and slots > self.limits.prefill_tokens:
                break
            chunks.append(Chunk.of(request, request.num_computed + count))
            longest, num_slots = max(longest, count), slots
        return chunks, num_slots

    def _next_len(self, request: Request) -> int:
        """Tokens of the next chunk; where one can start anywhere, those whose logits are wanted
        begin one of their own."""
        end, first = request.num_tokens, request.first_logits
        if self.limits.reuse == "tokens" and first is not None and request.num_computed < first:
            end = first
        return min(end - request.num_computed, self.limits.prefill_tokens)


def _rank(request: Request) -> tuple[int, int]:
    return (-request.params.priority, request.sequence)


def limits_of(artifact: Artifact) -> Limits:
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
